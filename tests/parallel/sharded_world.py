"""Tensor-parallel engines whose followers are threads: the engine tests' world, and every rank's memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shard_threads import Threads

from vlcache_dist.kv.arena import Arena
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.parallel import LanguageShard, Shard
from vlcache_dist.parallel import follower, protocol
from vlcache_dist.parallel.build import open_arenas
from vlcache_dist.parallel.collective import Collective, host_store
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.parallel.runner import ShardedRunner
from vlcache_dist.parallel.streaming import ShardedStreamer

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from engine_cases import World, model_config, random_model

CONFIG = model_config(heads=8, kv_heads=4)


def shard_of(whole: LanguageModel, config: ModelConfig, shard: Shard, collective: Collective) -> LanguageShard:
    model = LanguageShard(
        config.text, config.tie_word_embeddings, shard, collective.all_reduce, whole.device, whole.dtype
    )
    for name, tensor in whole.parameters().items():
        model.fill(name, tensor)
    return model


@dataclass
class Sharded:
    """A world over ``size`` ranks of the model that ``World(seed)`` has, and every rank's pages and arena."""

    world: World
    group: ShardGroup
    launcher: Threads
    pages: dict[int, torch.Tensor]
    arenas: dict[int, Arena]

    def kv_of(self, request_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``World.kv_of``, the KV heads of all ranks side by side."""
        sequence = self.world.engine._sequences[request_id]
        slots = sequence.slots(0, sequence.num_computed)
        flat = [self.pages[rank].flatten(2, 3)[:, :, slots] for rank in sorted(self.pages)]
        whole = torch.cat(flat, dim=-2)
        return whole[:, 0].clone(), whole[:, 1].clone()


@contextmanager
def sharded_world(
    size: int, monkeypatch: Any, *, seed: int = 0, config: ModelConfig | None = None, **options: Any
) -> Iterator[Sharded]:
    config = config or CONFIG
    whole = random_model(config, seed)
    pages: dict[int, torch.Tensor] = {}
    arenas: dict[int, Arena] = {}

    def allocate(layout: KVLayout, *shape: Any) -> torch.Tensor:
        pages[layout.tp_rank] = made = original_pages(layout, *shape)
        return made

    def arena(layout: KVLayout, *about: Any) -> Arena:
        arenas[layout.tp_rank] = made = Arena(layout, *about)
        made.tensor.fill_(float("nan"))  # whatever is read before it is written shows
        return made

    original_pages = follower.allocate_pages
    monkeypatch.setattr(follower, "allocate_pages", allocate)
    monkeypatch.setattr(follower, "Arena", arena)

    def load(
        command: protocol.Load, shard: Shard, collective: Collective, device: torch.device, layout: KVLayout
    ) -> LanguageShard:
        return shard_of(whole, config, shard, collective)

    launcher = Threads(load)
    group = ShardGroup(launcher, size)
    try:

        def make_runner(
            model: LanguageModel, own_pages: torch.Tensor, own_arena: Arena
        ) -> tuple[ShardedRunner, ShardedStreamer]:
            pages[0], arenas[0] = own_pages, own_arena
            open_arenas(group, own_arena.tensor, own_arena.layout)
            store = host_store("127.0.0.1")
            group.post(protocol.Load(store.port, ""))
            collective = group.meet(lambda: Collective(store, "127.0.0.1", 0, size, torch.device("cpu")))
            group.confirm(protocol.Loaded)
            shards.append(collective)
            runner = ShardedRunner(shard, own_pages, own_arena, group)
            return runner, ShardedStreamer(runner, group)

        shards: list[Collective] = []
        shard = LanguageShard(
            config.text,
            config.tie_word_embeddings,
            Shard(0, size),
            lambda x: shards[0].all_reduce(x),
            "cpu",
            whole.dtype,
        )
        for name, tensor in whole.parameters().items():
            shard.fill(name, tensor)
        world = World(seed, config=config, model=shard, tp_size=size, make_runner=make_runner, **options)
        yield Sharded(world, group, launcher, pages, arenas)
    finally:
        group.close()
    assert all(thread.error is None for thread in launcher.threads), [thread.error for thread in launcher.threads]
    assert not any(thread.alive() for thread in launcher.threads)
