"""From settings to workers: what the Ray actors, the tests and the benchmarks build their processes with.

Each function returns a worker that is not started yet. Torch and weights are loaded here, so call it off the event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlcache_dist.cache_directory.client import Addresses
from vlcache_dist.config import Settings
from vlcache_dist.decode_workers.worker import DecodeWorker
from vlcache_dist.encoder_workers.worker import EncoderWorker
from vlcache_dist.engine.build import Placement, build_engine, build_store, kv_layout
from vlcache_dist.engine.engine import Engine
from vlcache_dist.hashing import ModelIdentity
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.media import MediaProcessor
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.node import FrontNode, Node
from vlcache_dist.prefill_workers.worker import PrefillWorker
from vlcache_dist.prompt import PromptBuilder
from vlcache_dist.serve.frontend import Frontend
from vlcache_dist.transfer.base import Transport
from vlcache_dist.transfer.fetch import FetchLimits
from vlcache_dist.types import Role, WorkerId

TransportFactory = Callable[[WorkerId, torch.Tensor, KVLayout], Transport]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a process runs: its name in the pool, the address that others reach it at, how it finds the directory."""

    name: str
    host: str
    directory: Addresses


@dataclass(frozen=True, slots=True)
class Model:
    """An opened checkpoint and how this process computes with it."""

    checkpoint: Checkpoint
    placement: Placement
    layout: KVLayout

    @classmethod
    def open(cls, settings: Settings) -> Model:
        """Raises CheckpointError, UnsupportedModel."""
        checkpoint = Checkpoint.open(settings.model.model, settings.model.revision)
        placement = Placement.of(settings.model)
        return cls(checkpoint, placement, kv_layout(checkpoint.config, checkpoint.fingerprint, placement.dtype))


def nixl_transport(worker_id: WorkerId, arena: torch.Tensor, layout: KVLayout) -> Transport:
    """The production transport."""
    from vlcache_dist.transfer.nixl import NixlTransport

    return NixlTransport(worker_id, arena, layout)


def build_encoder(settings: Settings, site: Site, transport: TransportFactory = nixl_transport) -> EncoderWorker:
    """The vision tower and a store for its output."""
    model = Model.open(settings)
    node = _node(settings, site, Role.ENCODER, model, transport)
    tower = model.checkpoint.load_vision_tower(model.placement.device, model.placement.torch_dtype)
    processor = MediaProcessor.from_folder(model.checkpoint.folder, settings.media)
    return EncoderWorker(node, tower.forward, processor)


def build_prefill(settings: Settings, site: Site, transport: TransportFactory = nixl_transport) -> PrefillWorker:
    """The language model, paged KV and a store for image KV."""
    model = Model.open(settings)
    node = _node(settings, site, Role.PREFILL, model, transport)
    return PrefillWorker(node, _engine(settings, model, node))


def build_decode(settings: Settings, site: Site, transport: TransportFactory = nixl_transport) -> DecodeWorker:
    """As ``build_prefill``, for the decode pool."""
    model = Model.open(settings)
    node = _node(settings, site, Role.DECODE, model, transport)
    return DecodeWorker(node, _engine(settings, model, node))


def build_frontend(settings: Settings, site: Site) -> Frontend:
    """The ingress: tokenizer and processor, no weights, no device."""
    model = Model.open(settings)
    config = model.checkpoint.config
    limit = config.text.max_position_embeddings
    prompts = PromptBuilder.from_folder(
        model.checkpoint.folder,
        merge_size=config.vision.spatial_merge_size,
        max_model_len=min(limit, settings.model.max_model_len or limit),
    )
    identity = ModelIdentity(
        settings.model.model, settings.model.revision or "", model.checkpoint.fingerprint, model.placement.dtype
    )
    return Frontend(
        FrontNode(site.host, site.directory),
        settings,
        model=settings.model.served_name or settings.model.model,
        layout=model.layout,
        identity=identity,
        processor=MediaProcessor.from_folder(model.checkpoint.folder, settings.media),
        prompts=prompts,
        eos_token_ids=config.eos_token_ids,
    )


def _node(settings: Settings, site: Site, role: Role, model: Model, transport: TransportFactory) -> Node:
    arena, store = build_store(model.layout, settings.engine, model.placement.device)
    return Node(
        name=site.name,
        role=role,
        host=site.host,
        directory=site.directory,
        arena=arena,
        store=store,
        make_transport=lambda worker_id: transport(worker_id, arena.tensor, model.layout),
        limits=FetchLimits(lease_s=settings.serve.lease_s, transfer_s=settings.serve.transfer_timeout_s),
    )


def _engine(settings: Settings, model: Model, node: Node) -> Engine:
    language = model.checkpoint.load_language_model(model.placement.device, model.placement.torch_dtype)
    return build_engine(
        language,
        model.checkpoint.config,
        settings.engine,
        node.arena,
        node.store,
        max_model_len=settings.model.max_model_len,
    )

