"""What all processes are built from: an opened model, a node with its store and transport, an engine.

The pools' ``build`` modules put workers together from these. Nothing here is started. Torch and weights are loaded, so
call it off the event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vlcache_dist.cache_directory.client import Addresses
from vlcache_dist.config import Settings
from vlcache_dist.engine.build import Placement, build_engine, build_store, kv_layout, store_bytes
from vlcache_dist.engine.engine import Engine
from vlcache_dist.errors import ConfigError
from vlcache_dist.hashing import ModelIdentity
from vlcache_dist.kv.arena import free_bytes
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.model.parallel import Shard
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.node import Node
from vlcache_dist.parallel.build import build_sharded_engine, open_arenas
from vlcache_dist.parallel.group import Launcher, ShardGroup
from vlcache_dist.parallel.processes import Processes
from vlcache_dist.parallel.transport import ShardedTransport
from vlcache_dist.transfer.base import Transport
from vlcache_dist.transfer.fetch import FetchLimits
from vlcache_dist.types import Role, WorkerId

TransportFactory = Callable[[WorkerId, torch.Tensor, KVLayout], Transport]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a process runs: its name in the pool, the address that others reach it at, how it finds the directory, and
    how the other ranks of a tensor-parallel worker are started."""

    name: str
    host: str
    directory: Addresses
    shards: Launcher = field(default_factory=Processes)


@dataclass(frozen=True, slots=True)
class Model:
    """An opened checkpoint and how this process computes with it."""

    checkpoint: Checkpoint
    placement: Placement
    layout: KVLayout
    identity: ModelIdentity

    @classmethod
    def open(cls, settings: Settings) -> Model:
        """Raises CheckpointError, UnsupportedModel; ConfigError for a tensor-parallel size that does not fit it."""
        own = settings.model
        checkpoint = Checkpoint.open(own.model, own.revision)
        placement = Placement.of(own)
        return cls(
            checkpoint,
            placement,
            kv_layout(checkpoint.config, checkpoint.fingerprint, placement.dtype, settings.engine.tensor_parallel),
            ModelIdentity(own.model, own.revision or "", checkpoint.fingerprint, placement.dtype),
        )


def nixl_transport(worker_id: WorkerId, arena: torch.Tensor, layout: KVLayout) -> Transport:
    """The production transport."""
    from vlcache_dist.transfer.nixl import NixlTransport

    return NixlTransport(worker_id, arena, layout)


def make_node(settings: Settings, site: Site, role: Role, model: Model, transport: TransportFactory) -> Node:
    """A worker's node: arena, store, transport, RPC, directory client. Raises ConfigError if the role's part of the
    model and the store do not fit the device."""
    require_device(model)
    require_memory(settings, role, model)
    arena, store = build_store(model.layout, settings.engine, model.placement.device)
    shown = model.layout.without_kv() if role is Role.ENCODER else model.layout
    return Node(
        name=site.name,
        role=role,
        host=site.host,
        directory=site.directory,
        arena=arena,
        store=store,
        make_transport=lambda worker_id: transport(worker_id, arena.tensor, shown),
        limits=FetchLimits(
            lease_s=settings.serve.lease_s,
            transfer_s=settings.serve.transfer_timeout_s,
            floor=None if settings.serve.link_floor_gbps is None else settings.serve.link_floor_gbps * 1e9,
            refuse_slow=settings.serve.refuse_slow_links,
        ),
    )


def require_device(model: Model) -> None:
    """Raises ConfigError if this machine does not have the device that the settings name."""
    device = model.placement.device
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device = '{device}', but torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices "
            "here: take another device, or a torch that is built for this machine's GPUs"
        )


def require_memory(settings: Settings, role: Role, model: Model) -> None:
    """Raises ConfigError if the role's part of the model and its store do not fit. Before anything is allocated: an
    allocator says less, and a machine's memory may be overcommitted."""
    vision = role is Role.ENCODER
    shard = Shard(0, 1 if vision else settings.engine.tensor_parallel)
    tensors = [(name, t) for name, t in model.checkpoint.tensors.items() if ("visual." in name) == vision]
    weights = sum(shard.elements(name, tensor.shape) for name, tensor in tensors) * model.layout.itemsize
    device = model.placement.device
    store = store_bytes(settings.engine, device)
    free = free_bytes(device)
    if weights + store > free:
        raise ConfigError(
            f"{settings.model.model} does not fit: its {'vision encoder' if vision else 'language model'} takes "
            f"{weights / 2**30:.2f} GiB and the store (engine.store_bytes) {store / 2**30:.2f} GiB, but {device} has "
            f"{free / 2**30:.2f} GiB free; take a smaller model, a smaller store, or fewer workers per device"
        )


def make_language_worker(
    settings: Settings, site: Site, role: Role, transport: TransportFactory
) -> tuple[Node, Engine]:
    """Node and engine of a prefill or decode worker, and the other ranks' processes if it is tensor-parallel: they end
    with the engine's runner, or here if anything fails."""
    model = Model.open(settings)
    size = settings.engine.tensor_parallel
    if size == 1:
        node = make_node(settings, site, role, model, transport)
        return node, make_engine(settings, model, node)
    group = ShardGroup(site.shards, size)

    def sharded(worker_id: WorkerId, arena: torch.Tensor, layout: KVLayout) -> Transport:
        peers = open_arenas(group, arena, layout, worker_id)
        return ShardedTransport(transport(worker_id, arena, layout), group, peers)

    try:
        node = make_node(settings, site, role, model, sharded)
        engine = build_sharded_engine(
            group,
            model.checkpoint,
            settings.engine,
            node.arena,
            node.store,
            max_model_len=settings.model.max_model_len,
        )
    except BaseException:
        group.close()
        raise
    return node, engine


def make_engine(settings: Settings, model: Model, node: Node) -> Engine:
    """The language model with paged KV, over the node's arena and store."""
    language = model.checkpoint.load_language_model(model.placement.device, model.placement.torch_dtype)
    return build_engine(
        language,
        model.checkpoint.config,
        settings.engine,
        node.arena,
        node.store,
        max_model_len=settings.model.max_model_len,
    )
