"""From a checkpoint and settings to a running engine: device, dtype, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlcache_dist.config import EngineSettings, ModelSettings
from vlcache_dist.engine.engine import Engine, EngineConfig
from vlcache_dist.engine.runner import Runner
from vlcache_dist.engine.streaming import Streamer
from vlcache_dist.kernels import backends
from vlcache_dist.kv.arena import TORCH_DTYPES, Arena, allocate_pages, free_bytes, plan_memory
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import ObjectStore
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.parallel import shard_config

MakeRunner = Callable[[LanguageModel, torch.Tensor, Arena], tuple[Runner, Streamer]]
CPU_KV_BYTES = 256 << 20
CPU_STORE_BYTES = 256 << 20
MAX_WAITING = 1024


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model computes, and in what."""

    device: torch.device
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @classmethod
    def of(cls, settings: ModelSettings) -> Placement:
        """``auto``: the first GPU and bf16 if there is one, else CPU and fp32."""
        name = settings.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if settings.dtype != "auto":
            return cls(device, settings.dtype)
        return cls(device, "bfloat16" if device.type == "cuda" else "float32")


def kv_layout(config: ModelConfig, fingerprint: str, dtype: str, tp_size: int = 1) -> KVLayout:
    """The shape of this model's KV and embeddings, or of its first of ``tp_size`` shards; ``fingerprint`` names its
    weights. Raises ConfigError if the model cannot be dealt out so."""
    text = shard_config(config.text, tp_size)
    return KVLayout(
        text.num_layers, text.num_kv_heads, text.head_dim, text.hidden_size, dtype, fingerprint, tp_size=tp_size
    )


def store_bytes(settings: EngineSettings, device: torch.device) -> int:
    """The arena's size: as given, or a share of the device's free memory, to be asked before weights are loaded."""
    if settings.store_bytes is not None:
        return settings.store_bytes
    return CPU_STORE_BYTES if device.type == "cpu" else int(free_bytes(device) * settings.store_fraction)


def build_store(layout: KVLayout, settings: EngineSettings, device: torch.device) -> tuple[Arena, ObjectStore]:
    """The arena for image KV, encoder output and staging, and its book. Raises ConfigError if it is too small."""
    plan = plan_memory(
        layout,
        settings.block_size,
        pages_bytes=layout.kv_token * settings.block_size * layout.itemsize,
        arena_bytes=store_bytes(settings, device),
    )
    arena = Arena(layout, plan.arena_elements, device)
    return arena, ObjectStore(plan.arena_elements, alignment=arena.alignment)


def make_whole_runner(model: LanguageModel, pages: torch.Tensor, arena: Arena) -> tuple[Runner, Streamer]:
    """Of a model that is not dealt out."""
    runner = Runner(model, pages, arena)
    return runner, Streamer(runner)


def build_engine(
    model: LanguageModel,
    config: ModelConfig,
    settings: EngineSettings,
    arena: Arena,
    store: ObjectStore,
    *,
    max_model_len: int | None = None,
    make_runner: MakeRunner = make_whole_runner,
) -> Engine:
    """An engine on the model's device that shares ``arena`` and ``store``. The arena comes first: pages take a share of
    the memory that is free after it. Blocks are of ``settings.block_size`` tokens or, on CUDA, of as many more as the
    attention backend wants. ``make_runner``: the runner over model, pages and arena, and its streamer. Raises
    ConfigError if memory holds no block."""
    layout = arena.layout
    pages_bytes = settings.kv_bytes
    if pages_bytes is None and model.device.type == "cpu":
        pages_bytes = CPU_KV_BYTES
    if pages_bytes is None:
        pages_bytes = int(free_bytes(model.device) * settings.kv_fraction)
    attention = backends.select(model.device, arena.tensor.dtype, layout.head_dim)
    block_size = backends.page_size(attention, settings.block_size)
    plan = plan_memory(layout, block_size, pages_bytes=pages_bytes, arena_bytes=arena.tensor.numel() * layout.itemsize)
    pages = allocate_pages(layout, plan.num_blocks, block_size, model.device)
    runner, streamer = make_runner(model, pages, arena)
    limit = config.text.max_position_embeddings
    return Engine(
        EngineConfig(
            block_size=block_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_sequences,
            max_waiting=MAX_WAITING,
            max_model_len=limit if max_model_len is None else min(limit, max_model_len),
            graph_start_s=settings.graph_start_s,
        ),
        config,
        runner,
        store,
        streamer,
    )
