"""Who computes attention: one seam, chosen by capability when a (device, dtype, head_dim) is first seen, and logged.

================  ==================  ==========================================================================
backend           pages               runs on
================  ==================  ==========================================================================
``torch``         any                 anything; the definition; reads lengths on the host
``triton``        any (128 is best)   CUDA, any dtype; splits keys, so it is the one for few queries over many keys
``flash-attn-4``  multiple of 128     Hopper and later, 16-bit dtypes; does not split keys on Hopper
``flash-attn-3``  any                 Hopper, 16-bit dtypes
``flash-attn-2``  multiple of 256     Ampere and later, 16-bit dtypes
``auto``          as its parts want   CUDA: the fastest one for the call's shape among those present
================  ==================  ==========================================================================
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.kernels import attention
from vlcache_dist.kernels.dispatch import uses_triton
from vlcache_dist.kernels.flash import FlashAttention2, FlashAttention3, FlashAttention4

log = logging.getLogger(__name__)

LONG_QUERIES = 512  #: from this many queries on a backend that does not split keys has tiles enough
MAX_PAGE_MULTIPLE = 256


class AttentionBackend(Protocol):
    """Contracts as in ``kernels.attention``; ``page_multiple``: block_size must be a multiple of it."""

    name: str
    page_multiple: int

    def segment_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
        block_table: torch.Tensor, max_q: int, max_kv: int, scale: float,
    ) -> torch.Tensor: ...  # fmt: skip

    def varlen_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
        causal: bool,
    ) -> torch.Tensor: ...  # fmt: skip


class Torch:
    """The definition."""

    name = "torch"
    page_multiple = 1
    segment_attention = staticmethod(attention.segment_attention_reference)
    varlen_attention = staticmethod(attention.varlen_attention_reference)


class Triton:
    """Our kernel."""

    name = "triton"
    page_multiple = 1

    def __init__(self) -> None:
        from vlcache_dist.kernels.gpu import attention as gpu

        self.segment_attention = gpu.segment_attention
        self.varlen_attention = gpu.varlen_attention


class Auto:
    """``few`` (splits keys) below LONG_QUERIES queries or where the page size does not suit ``many``, else ``many``;
    packed sequences by ``packed``."""

    name = "auto"

    def __init__(self, few: AttentionBackend, many: AttentionBackend) -> None:
        self.few, self.many = few, many
        self.page_multiple = max(few.page_multiple, many.page_multiple)

    def segment_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
        block_table: torch.Tensor, max_q: int, max_kv: int, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        fits = max_q >= LONG_QUERIES and k_pages.shape[1] % self.many.page_multiple == 0
        chosen = self.many if fits else self.few
        return chosen.segment_attention(q, k_pages, v_pages, cu_q, kv_len, block_table, max_q, max_kv, scale)

    def varlen_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
        causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        return self.many.varlen_attention(q, k, v, cu, max_len, scale, causal)


class TorchFlash:
    """torch's own FlashAttention-2 on packed sequences (``torch.nn.attention.varlen``); paged calls go to ``paged``."""

    name = "torch-flash"

    def __init__(self, paged: AttentionBackend) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self._varlen, self._paged = varlen_attn, paged
        self.page_multiple = paged.page_multiple
        self.segment_attention = paged.segment_attention

    def varlen_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
        causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        if causal or q.shape[1] != k.shape[1] or scale != q.shape[2] ** -0.5:
            return self._paged.varlen_attention(q, k, v, cu, max_len, scale, causal)
        return self._varlen(q, k, v, cu, cu, max_len, max_len)
