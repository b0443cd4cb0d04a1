"""A tensor-parallel engine from a checkpoint and settings: arenas first, then weights, then pages, on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlcache_dist.config import EngineSettings
from vlcache_dist.engine.build import build_engine
from vlcache_dist.engine.engine import Engine
from vlcache_dist.kv.arena import Arena, free_bytes
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import ObjectStore
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.parallel import LanguageShard, Shard, load_shard
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.collective import Collective, host_store
from vlcache_dist.parallel.group import LOAD_S, START_S, ShardGroup
from vlcache_dist.parallel.runner import ShardedRunner
from vlcache_dist.parallel.streaming import ShardedStreamer
from vlcache_dist.transfer.base import PeerInfo


def open_arenas(group: ShardGroup, arena: torch.Tensor, layout: KVLayout, worker_id: str = "") -> list[PeerInfo]:
    """Have every follower make an arena like the leader's and, for a worker with an id, a transport over it. Returns
    where they are, in order of ranks. Raises what a follower failed with."""
    leader = str(arena.device)
    devices = tuple(group.launcher.device(rank, leader) for rank in range(1, group.size))
    group.post(p.Open(layout, arena.numel(), devices, worker_id))
    return [reply.peer for reply in group.confirm(p.Opened, START_S) if reply.peer is not None]


def build_sharded_engine(
    group: ShardGroup,
    checkpoint: Checkpoint,
    settings: EngineSettings,
    arena: Arena,
    store: ObjectStore,
    *,
    max_model_len: int | None = None,
) -> Engine:
    """As ``engine.build.build_engine``, for a worker whose followers have opened their arenas. ``kv_bytes`` counts per
    rank; a share of free memory is that of the rank which has least. Raises what a follower failed with."""

    def load(collective: Collective) -> LanguageShard:
        shard = Shard(0, group.size)
        return load_shard(checkpoint, shard, collective.all_reduce, arena.tensor.device, arena.tensor.dtype)

    return assemble(
        group, load, str(checkpoint.folder), checkpoint.config, settings, arena, store, max_model_len=max_model_len
    )


def assemble(
    group: ShardGroup,
    load: Callable[[Collective], LanguageShard],
    folder: str,
    config: ModelConfig,
    settings: EngineSettings,
    arena: Arena,
    store: ObjectStore,
    *,
    max_model_len: int | None = None,
    graphs: bool = False,
) -> Engine:
    """The ranks meet, load their weights (the leader by ``load``, the followers from ``folder``, whatever that means to
    them), and make their pages."""
    device = arena.tensor.device
    meeting = host_store(group.host)
    group.post(p.Load(meeting.port, folder))
    language = load(group.meet(lambda: Collective(meeting, group.host, 0, group.size, device)))
    loaded = group.confirm(p.Loaded, LOAD_S)
    if settings.kv_bytes is None and device.type == "cuda":
        free = min(free_bytes(device), *(reply.free_bytes for reply in loaded))
        settings = settings.model_copy(update={"kv_bytes": int(free * settings.kv_fraction)})

    def make_runner(_: LanguageModel, pages: torch.Tensor, over: Arena) -> tuple[ShardedRunner, ShardedStreamer]:
        runner = ShardedRunner(language, pages, over, group, graphs=graphs)
        return runner, ShardedStreamer(runner, group, graphs=graphs)

    return build_engine(language, config, settings, arena, store, max_model_len=max_model_len, make_runner=make_runner)
