"""Rotary embedding: ``rotate``, and the fused form in which a layer stores its K and V and rotates its queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vlcache_dist.kernels.gpu.device import pdl, supports_pdl

_HEAD_BLOCK = 8  # query heads per program
_FUSED_ROWS = 2_048  # beyond this a launch costs nothing, and rotate alone is better shaped for bandwidth


@triton.jit
def rotate_halves(a, b, cos, sin):
    """(a cos - b sin, b cos + a sin) in fp32."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, num_rows, x_stride, cos_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_R (row, head) pairs."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = pair // HEADS
    head = pair % HEADS
    column = tl.arange(0, BLOCK_H)
    mask = (row < num_rows)[:, None] & (column < HALF)[None, :]
    angle = row[:, None] * cos_stride + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    src = (row * x_stride + head * (2 * HALF))[:, None] + column[None, :]
    a = tl.load(x_ptr + src, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + src + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = rotate_halves(a, b, cos, sin)
    dst = (pair * (2 * HALF))[:, None] + column[None, :]
    tl.store(out_ptr + dst, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + dst + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See ``kernels.rope.rotate_reference``. cos and sin must have the same row stride."""
    rows, heads, dim = x.shape
    x = _dense_heads(x)
    out = torch.empty((rows, heads, dim), dtype=x.dtype, device=x.device)
    if rows:
        block_h = triton.next_power_of_2(dim // 2)
        block_r = max(1, 2048 // block_h)
        _rotate_kernel[(triton.cdiv(rows * heads, block_r),)](
            x, cos, sin, out, rows, x.stride(0), cos.stride(0), HEADS=heads, HALF=dim // 2, BLOCK_R=block_r,
            BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["num_queries", "layer"],
    do_not_specialize_on_alignment=["slots_ptr", "base_ptr", "tokens_ptr"],  # may be parts of longer arrays
)
def _rotate_write_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pages, v_pages, slots_ptr, arena_ptr, base_ptr, tokens_ptr, out_ptr,
    num_queries, q_stride, k_stride, v_stride, cos_stride, layer,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, RECORD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, 0) stores the row's K and V; program (row, 1 + i) rotates its i-th block of query heads."""
    D: tl.constexpr = 2 * HALF
    if PDL:  # the attention that follows may start; it waits for this kernel before it reads q or the pages
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, BLOCK_H)
    cos = tl.load(cos_ptr + row * cos_stride + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * cos_stride + column, mask=column < HALF, other=0.0)[None, :]
    if part > 0:
        if row < num_queries:
            head = (part - 1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            mask = (head < HEADS)[:, None] & (column < HALF)[None, :]
            place = (head * D)[:, None] + column[None, :]
            a = tl.load(q_ptr + row * q_stride + place, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(q_ptr + row * q_stride + place + HALF, mask=mask, other=0.0).to(tl.float32)
            first, second = rotate_halves(a, b, cos, sin)
            tl.store(out_ptr + row * (HEADS * D) + place, first.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + row * (HEADS * D) + place + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        head = tl.arange(0, BLOCK_KV)
        mask = (head < KV_HEADS)[:, None] & (column < HALF)[None, :]
        place = (head * D)[:, None] + column[None, :]
        stored = k_pages.dtype.element_ty
        ka = tl.load(k_ptr + row * k_stride + place, mask=mask, other=0.0).to(stored)
        kb = tl.load(k_ptr + row * k_stride + place + HALF, mask=mask, other=0.0).to(stored)
        va = tl.load(v_ptr + row * v_stride + place, mask=mask, other=0.0).to(stored)
        vb = tl.load(v_ptr + row * v_stride + place + HALF, mask=mask, other=0.0).to(stored)
        slot = tl.load(slots_ptr + row)
        if slot >= 0:
            first, second = rotate_halves(ka.to(tl.float32), kb.to(tl.float32), cos, sin)
            page = slot * (KV_HEADS * D) + place
            tl.store(k_pages + page, first.to(stored), mask=mask)
            tl.store(k_pages + page + HALF, second.to(stored), mask=mask)
            tl.store(v_pages + page, va, mask=mask)
            tl.store(v_pages + page + HALF, vb, mask=mask)
        if RECORD:
            base = tl.load(base_ptr + row)
            if base >= 0:
                width = tl.load(tokens_ptr + row) * (KV_HEADS * D)
                target = base + 2 * layer * width + place
                tl.store(arena_ptr + target, ka, mask=mask)
                tl.store(arena_ptr + target + HALF, kb, mask=mask)
                tl.store(arena_ptr + target + width, va, mask=mask)
                tl.store(arena_ptr + target + width + HALF, vb, mask=mask)


def _rotate_and_write(
    q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor | None,
    record_base: torch.Tensor, record_tokens: torch.Tensor, layer: int,
) -> torch.Tensor | None:  # fmt: skip
    rows, kv_heads, dim = k.shape
    k, v = _dense_heads(k), _dense_heads(v)
    heads, queries, out = 0, 0, None
    if q is not None:
        q = _dense_heads(q)
        queries, heads = q.shape[0], q.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    source, target = (k, k) if q is None or out is None else (q, out)
    _rotate_write_kernel[(rows, 1 + (triton.cdiv(heads, _HEAD_BLOCK) if queries else 0))](
        source, k, v, cos, sin, k_pages, v_pages, slots, k if arena is None else arena, record_base, record_tokens,
        target, queries, source.stride(0), k.stride(0), v.stride(0), cos.stride(0), layer,
        HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, BLOCK_H=triton.next_power_of_2(dim // 2), BLOCK_Q=_HEAD_BLOCK,
        BLOCK_KV=triton.next_power_of_2(kv_heads), RECORD=arena is not None, PDL=supports_pdl(k), num_warps=2, **pdl(k),
    )  # fmt: skip
    return out


def write_kv(
    k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor,
    v_pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor | None, record_base: torch.Tensor,
    record_tokens: torch.Tensor, layer: int,
) -> None:  # fmt: skip
    """See ``kernels.kv_write.write_kv_reference``."""
    _rotate_and_write(None, k, v, cos, sin, k_pages, v_pages, slots, arena, record_base, record_tokens, layer)


def rotate_and_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor,
    v_pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor | None, record_base: torch.Tensor,
    record_tokens: torch.Tensor, layer: int,
) -> torch.Tensor:  # fmt: skip
    """See ``kernels.kv_write.rotate_and_write_reference``."""
    if k.shape[0] > _FUSED_ROWS:
        write_kv(k, v, cos, sin, k_pages, v_pages, slots, arena, record_base, record_tokens, layer)
        return rotate(q, cos, sin)
    out = _rotate_and_write(q, k, v, cos, sin, k_pages, v_pages, slots, arena, record_base, record_tokens, layer)
    assert out is not None
    return out
