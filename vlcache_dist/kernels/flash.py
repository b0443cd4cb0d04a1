"""The flash-attn packages behind the backend seam. Each class imports its package when it is made.

None of them masks what a last, partly used page holds past a sequence's keys: 0 * NaN is NaN, so the pages must be
finite everywhere (a pool that starts zeroed stays so).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


def _first(result: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """The output of a call that may also return the log-sum-exp; copied to ``out`` if there is one."""
    result = result[0] if isinstance(result, tuple) else result
    return result if out is None else out.copy_(result)


class _Varlen:
    """The call that flash-attn 2 and 3 have in common; ``_varlen`` is their function for it."""

    _varlen: Callable[..., Any]

    def varlen_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
        causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        return _first(self._varlen(q, k, v, cu, cu, max_len, max_len, softmax_scale=scale, causal=causal))


class FlashAttention2(_Varlen):
    """Package ``flash-attn`` 2.x: pages must be a multiple of 256 tokens."""

    name = "flash-attn-2"
    page_multiple = 256
    page_best = 256

    def __init__(self) -> None:
        self._varlen = importlib.import_module("flash_attn").flash_attn_varlen_func

    def segment_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
        block_table: torch.Tensor, max_q: int, max_kv: int, scale: float, out: torch.Tensor | None = None,
        settled: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        cu_k = torch.nn.functional.pad(kv_len.cumsum(0, dtype=torch.int32), (1, 0))
        return _first(
            self._varlen(
                q, k_pages, v_pages, cu_q, cu_k, max_q, max_kv, softmax_scale=scale, causal=True,
                block_table=block_table,
            ),
            out,
        )  # fmt: skip


class FlashAttention3(_Varlen):
    """Module ``flash_attn_interface`` (the hopper build of flash-attn 3): any page size, splits keys by itself."""

    name = "flash-attn-3"
    page_multiple = 1
    page_best = 128

    def __init__(self) -> None:
        module = importlib.import_module("flash_attn_interface")
        self._cached = module.flash_attn_with_kvcache
        self._varlen = module.flash_attn_varlen_func

    def segment_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
        block_table: torch.Tensor, max_q: int, max_kv: int, scale: float, out: torch.Tensor | None = None,
        settled: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        return _first(
            self._cached(
                q, k_pages, v_pages, cache_seqlens=kv_len, page_table=block_table, cu_seqlens_q=cu_q,
                max_seqlen_q=max_q, softmax_scale=scale, causal=True,
            ),
            out,
        )  # fmt: skip


class FlashAttention4:
    """Package ``flash-attn-4`` (CuTe DSL, compiled at the first call of each kind). Pages of 128 tokens are read by the
    bulk copy engine, other sizes more slowly. It does not split keys on Hopper."""

    name = "flash-attn-4"
    page_multiple = 128
    page_best = 128

    def __init__(self) -> None:
        self._varlen = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

    def segment_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
        block_table: torch.Tensor, max_q: int, max_kv: int, scale: float, out: torch.Tensor | None = None,
        settled: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        return _first(
            self._varlen(
                q, k_pages, v_pages, cu_seqlens_q=cu_q, max_seqlen_q=max_q, max_seqlen_k=max_kv, seqused_k=kv_len,
                page_table=block_table, softmax_scale=scale, causal=True,
            ),
            out,
        )  # fmt: skip

    def varlen_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
        causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        return _first(
            self._varlen(
                q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max_len, max_seqlen_k=max_len,
                softmax_scale=scale, causal=causal,
            )
        )  # fmt: skip
