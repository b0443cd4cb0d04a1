"""A tensor-parallel engine from a checkpoint and settings: arenas first, then weights, then pages, on all ranks."""

from __future__ import annotations

import torch

from vlcache_dist.config import EngineSettings, ModelSettings
from vlcache_dist.engine.build import Placement, build_engine
from vlcache_dist.engine.engine import Engine
from vlcache_dist.kv.arena import Arena, free_bytes
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import ObjectStore
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.parallel import Shard, load_shard
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.collective import Collective, host_store
from vlcache_dist.parallel.group import LOAD_S, START_S, ShardGroup
from vlcache_dist.parallel.runner import ShardedRunner
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
    model: ModelSettings,
    settings: EngineSettings,
    arena: Arena,
    store: ObjectStore,
) -> Engine:
    """As ``engine.build.build_engine``, for a worker whose followers have opened their arenas. ``kv_bytes`` counts per
    rank; a share of free memory is that of the rank which has least. Raises what a follower failed with."""
    own = Placement.of(model)
    device = arena.tensor.device
    kv_store = host_store(group.host)
    group.post(p.Load(kv_store.port, str(checkpoint.folder)))
    collective = group.meet(lambda: Collective(kv_store, group.host, 0, group.size, device))
    language = load_shard(checkpoint, Shard(0, group.size), collective.all_reduce, device, own.torch_dtype)
    loaded = group.confirm(p.Loaded, LOAD_S)
    if settings.kv_bytes is None and device.type == "cuda":
        free = min(free_bytes(device), *(reply.free_bytes for reply in loaded))
        settings = settings.model_copy(update={"kv_bytes": int(free * settings.kv_fraction)})

    def make_runner(_: LanguageModel, pages: torch.Tensor, over: Arena) -> ShardedRunner:
        return ShardedRunner(language, pages, over, group)

    return build_engine(
        language,
        checkpoint.config,
        settings,
        arena,
        store,
        max_model_len=model.max_model_len,
        make_runner=make_runner,
    )
