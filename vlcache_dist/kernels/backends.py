"""Who computes attention: one seam, chosen by capability and logged once per (device, dtype, head_dim).

================  ==================  ==========================================================================
backend           pages               runs on
================  ==================  ==========================================================================
``torch``         any                 anything; the definition; reads lengths on the host, so no CUDA graphs
``triton``        any (128 is best)   CUDA, any dtype; splits keys: the one for few queries over many keys
``flash-attn-4``  multiple of 128     Hopper and later, 16-bit dtypes; does not split keys on Hopper
``flash-attn-3``  any                 Hopper, 16-bit dtypes
``flash-attn-2``  multiple of 256     Ampere and later, 16-bit dtypes
``auto``          as its parts want   CUDA: per call, Triton or the best flash-attn present, by shape
================  ==================  ==========================================================================

Measured on one H200 (28 query heads, 4 KV heads, head_dim 128, 16,384 keys): flash-attn-4 is the fastest from about
400 queries on (16,384 queries: 720 TFLOP/s against 550), Triton below (256 queries: 430 against 330; 1 query: 13 us
against 174). On the vision tower (16 heads, head_dim 80) flash-attn-4 is the fastest on whole images, Triton on
windows. flash-attn-3 and flash-attn-2 have no wheels on PyPI; their classes follow the packages' interfaces and have
not been run.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.kernels import attention
from vlcache_dist.kernels.dispatch import uses_triton
from vlcache_dist.kernels.flash import FlashAttention2, FlashAttention3, FlashAttention4

log = logging.getLogger(__name__)

NAMES = ("auto", "torch", "triton", "flash-attn-4", "flash-attn-3", "flash-attn-2")
_FLASH_TILE = 128  # rows of a flash-attn tile
_LONG_SEQUENCE = 512  # packed sequences from here on are worth flash-attn's larger tiles


class AttentionBackend(Protocol):
    """Contracts as in ``kernels.attention``. A block_size must be a multiple of ``page_multiple``; from ``page_best``
    on the backend is at its fastest."""

    name: str
    page_multiple: int
    page_best: int

    def segment_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
        block_table: torch.Tensor, max_q: int, max_kv: int, scale: float, out: torch.Tensor | None = None,
        settled: bool = False,
    ) -> torch.Tensor: ...  # fmt: skip

    def varlen_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
        causal: bool,
    ) -> torch.Tensor: ...  # fmt: skip


class Torch:
    """The definition."""

    name = "torch"
    page_multiple = 1
    page_best = 1
    segment_attention = staticmethod(attention.segment_attention_reference)
    varlen_attention = staticmethod(attention.varlen_attention_reference)


class Triton:
    """Our kernels. Pages of at least a key tile come by the bulk copy engine; smaller ones are gathered row by row."""

    name = "triton"
    page_multiple = 1
    page_best = 128

    def __init__(self) -> None:
        from vlcache_dist.kernels.gpu import attention as gpu

        self.segment_attention = gpu.segment_attention
        self.varlen_attention = gpu.varlen_attention


class Auto:
    """``few`` splits keys and takes what ``many`` cannot fill the device with; ``many`` has the faster large tiles."""

    name = "auto"

    def __init__(self, few: AttentionBackend, many: AttentionBackend, processors: int) -> None:
        self.few, self.many = few, many
        self.page_multiple = max(few.page_multiple, many.page_multiple)
        self.page_best = max(few.page_best, many.page_best)
        self._enough_tiles = 0.6 * processors

    def segment_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
        block_table: torch.Tensor, max_q: int, max_kv: int, scale: float, out: torch.Tensor | None = None,
        settled: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        tiles = q.shape[0] * q.shape[1] / _FLASH_TILE
        fits = k_pages.shape[1] % self.many.page_multiple == 0
        chosen = self.many if fits and max_q >= _FLASH_TILE and tiles >= self._enough_tiles else self.few
        return chosen.segment_attention(
            q, k_pages, v_pages, cu_q, kv_len, block_table, max_q, max_kv, scale, out, settled
        )

    def varlen_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
        causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        chosen = self.many if max_len >= _LONG_SEQUENCE else self.few
        return chosen.varlen_attention(q, k, v, cu, max_len, scale, causal)


_TORCH = Torch()
_FLASH: dict[str, tuple[Callable[[], AttentionBackend], str, tuple[int, int], tuple[int, int]]] = {
    "flash-attn-4": (FlashAttention4, "flash_attn.cute", (9, 0), (99, 0)),
    "flash-attn-3": (FlashAttention3, "flash_attn_interface", (9, 0), (9, 9)),
    "flash-attn-2": (FlashAttention2, "flash_attn.flash_attn_interface", (8, 0), (99, 0)),
}  # factory, module, first and last compute capability; best first
_preferred = "auto"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is absent
        return False


def unavailable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the backend cannot run there; empty if it can."""
    if name == "torch":
        return ""
    if device.type != "cuda":
        return f"{name} needs a CUDA device, not {device}"
    if name in ("auto", "triton"):
        return "" if _importable("triton") else "the package triton is not installed"
    _, module, first, last = _FLASH[name]
    capability = torch.cuda.get_device_capability(device)
    if not first <= capability <= last:
        return f"{name} does not run on compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{name} does not take {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"{name} does not take head_dim {head_dim}"
    return "" if _importable(module) else f"the module {module} is not installed"


@lru_cache(maxsize=64)
def select(device: torch.device, dtype: torch.dtype, head_dim: int, name: str = "auto") -> AttentionBackend:
    """The backend called ``name`` for tensors of this kind; ``auto`` is ``torch`` off CUDA. Raises ConfigError where it
    cannot run, saying why."""
    if name not in NAMES:
        raise ConfigError(f"attention backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if name == "auto" and (device.type != "cuda" or not _importable("triton")):
        name = "torch"
    reason = unavailable(name, device, dtype, head_dim)
    if reason:
        raise ConfigError(f"attention backend {name!r}: {reason}; use 'auto'")
    backend = _build(name, device, dtype, head_dim)
    parts = f" ({backend.few.name} and {backend.many.name})" if isinstance(backend, Auto) else ""
    log.info(
        "attention on %s, %s, head_dim %d: %s%s, pages of a multiple of %d tokens",
        device, dtype, head_dim, backend.name, parts, backend.page_multiple,
    )  # fmt: skip
    return backend


def _build(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    if name == "torch":
        return _TORCH
    if name in _FLASH:
        return _FLASH[name][0]()
    ours = Triton()
    if name == "auto":
        for flash, (factory, *_) in _FLASH.items():
            if unavailable(flash, device, dtype, head_dim):
                continue
            try:
                return Auto(ours, factory(), torch.cuda.get_device_properties(device).multi_processor_count)
            except (ImportError, OSError) as error:
                log.warning("attention backend %s is installed but cannot be loaded: %s", flash, error)
    return ours


def prefer(name: str) -> None:
    """Make ``segment_attention`` and ``varlen_attention`` use this backend on CUDA, process-wide. Raises ConfigError
    for an unknown name. Not to be changed under a captured CUDA graph."""
    global _preferred
    if name not in NAMES:
        raise ConfigError(f"attention backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    _preferred = name


def page_size(backend: AttentionBackend, wanted: int) -> int:
    """The smallest block_size >= ``wanted`` at which the backend is fast: what an engine asks before it makes its pool.
    On CPU that is ``wanted`` itself."""
    multiple = backend.page_multiple
    return -(-max(wanted, backend.page_best) // multiple) * multiple


def _active(q: torch.Tensor) -> AttentionBackend:
    return select(q.device, q.dtype, q.shape[-1], _preferred) if uses_triton(q) else _TORCH


def compile_attention(heads: int, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Compile what Triton's ``segment_attention`` of ``heads`` query heads over such pages can need. flash-attn
    compiles once, at its first call."""
    if uses_triton(k_pages):
        from vlcache_dist.kernels.gpu import attention as gpu

        gpu.compile_ahead(heads, k_pages, v_pages)


def segment_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
    block_table: torch.Tensor, max_q: int, max_kv: int, scale: float, out: torch.Tensor | None = None,
    settled: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of segments over paged keys by the active backend. Pages must be finite everywhere, because some
    backends read (and mask) what lies past a segment's keys. See ``attention.segment_attention_reference``."""
    backend = _active(q)
    return backend.segment_attention(q, k_pages, v_pages, cu_q, kv_len, block_table, max_q, max_kv, scale, out, settled)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention inside packed sequences by the active backend. See ``attention.varlen_attention_reference``."""
    return _active(q).varlen_attention(q, k, v, cu, max_len, q.shape[-1] ** -0.5 if scale is None else scale, causal)
