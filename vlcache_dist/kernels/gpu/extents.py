"""Between extents ``[layer, 2, token, kv_head, head_dim]`` and pages: with rotation (a hit) and without (staging).

These kernels move bytes and little else. A program handles a block of (token, head) pairs or of rows over a few
layers, so that cosines are read once and several loads are in flight; offsets are int64 throughout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlcache_dist.kernels.gpu.rope import rotate_halves

_LAYERS = 4  # layers per program: cos and sin stay in registers over them
_SCATTER_ELEMENTS = 1024  # elements of a half head per program and layer
_COPY_ELEMENTS = 4096  # elements per program
_WARPS = 4
INDICES = ("base_ptr", "tokens_ptr", "slots_ptr")  # may be parts of longer arrays; not worth another compiled form


@triton.jit(do_not_specialize=["count", "layer_start", "layer_stop"], do_not_specialize_on_alignment=INDICES)
def _rotate_scatter_kernel(
    arena_ptr, pages_ptr, base_ptr, tokens_ptr, slots_ptr, cos_ptr, sin_ptr,
    count, cos_stride, plane, layer_start, layer_stop,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """``plane`` is the element count of pages[layer, which]."""
    D: tl.constexpr = 2 * HALF
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    token = pair // HEADS
    head = pair % HEADS
    slot = tl.load(slots_ptr + token, mask=token < count, other=-1)
    live = slot >= 0
    base = tl.load(base_ptr + token, mask=live, other=0)
    width = tl.load(tokens_ptr + token, mask=live, other=0) * (HEADS * D)
    column = tl.arange(0, BLOCK_H)
    mask = live[:, None] & (column < HALF)[None, :]
    angle = token[:, None] * cos_stride + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    first_layer = layer_start + tl.program_id(1) * LAYERS
    for i in tl.static_range(LAYERS):
        layer = (first_layer + i).to(tl.int64)
        if layer < layer_stop:
            src = (base + 2 * layer * width + head * D)[:, None] + column[None, :]
            up = src + width[:, None]
            ka = tl.load(arena_ptr + src, mask=mask)
            kb = tl.load(arena_ptr + src + HALF, mask=mask)
            va = tl.load(arena_ptr + up, mask=mask)
            vb = tl.load(arena_ptr + up + HALF, mask=mask)
            dst = 2 * layer * plane + (slot * (HEADS * D) + head * D)[:, None] + column[None, :]
            first, second = rotate_halves(ka.to(tl.float32), kb.to(tl.float32), cos, sin)
            tl.store(pages_ptr + dst, first.to(pages_ptr.dtype.element_ty), mask=mask)
            tl.store(pages_ptr + dst + HALF, second.to(pages_ptr.dtype.element_ty), mask=mask)
            tl.store(pages_ptr + dst + plane, va, mask=mask)
            tl.store(pages_ptr + dst + plane + HALF, vb, mask=mask)


@triton.jit(do_not_specialize=["start", "count", "plane_start"], do_not_specialize_on_alignment=INDICES)
def _copy_rows_kernel(
    pages_ptr, arena_ptr, slots_ptr, base_ptr, tokens_ptr, start: tl.int64, count, plane, plane_start,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, TO_PAGES: tl.constexpr,
    STAGING: tl.constexpr,
):  # fmt: skip
    """Rows of one plane (layer, which) between pages and an extent; a staging extent has rows 0..count at ``start``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    index = (plane_start + tl.program_id(1)).to(tl.int64)
    column = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    slot = tl.load(slots_ptr + row, mask=row < count, other=-1)
    live = slot >= 0
    if STAGING:
        place = start + (index * count + row) * WIDTH
    else:
        tokens = tl.load(tokens_ptr + row, mask=live, other=0)
        place = tl.load(base_ptr + row, mask=live, other=0) + index * tokens * WIDTH
    mask = live[:, None] & (column < WIDTH)[None, :]
    paged = index * plane + (slot * WIDTH)[:, None] + column[None, :]
    extent = place[:, None] + column[None, :]
    if TO_PAGES:
        tl.store(pages_ptr + paged, tl.load(arena_ptr + extent, mask=mask), mask=mask)
    else:
        tl.store(arena_ptr + extent, tl.load(pages_ptr + paged, mask=mask), mask=mask)


def rotate_scatter(
    arena: torch.Tensor, pages: torch.Tensor, src_base: torch.Tensor, span_tokens: torch.Tensor, slots: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, layer_start: int, layer_stop: int,
) -> None:  # fmt: skip
    """See ``kernels.rotate_scatter.rotate_scatter_reference``. cos and sin must have the same row stride."""
    count, (heads, dim) = len(slots), pages.shape[-2:]
    if count == 0 or layer_stop <= layer_start:
        return
    block_h = triton.next_power_of_2(dim // 2)
    block_p = max(1, _SCATTER_ELEMENTS // block_h)
    _rotate_scatter_kernel[(triton.cdiv(count * heads, block_p), triton.cdiv(layer_stop - layer_start, _LAYERS))](
        arena, pages, src_base, span_tokens, slots, cos, sin, count, cos.stride(0), pages.stride(1), layer_start,
        layer_stop, HEADS=heads, HALF=dim // 2, BLOCK_P=block_p, BLOCK_H=block_h, LAYERS=_LAYERS, num_warps=_WARPS,
    )  # fmt: skip


def _copy_rows(
    pages: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor, base: torch.Tensor, tokens: torch.Tensor, start: int,
    planes: tuple[int, int], to_pages: bool, staging: bool,
) -> None:  # fmt: skip
    count, width = len(slots), pages.shape[-2] * pages.shape[-1]
    if count == 0 or planes[1] <= planes[0]:
        return
    block_w = min(1024, triton.next_power_of_2(width))
    block_r = max(1, _COPY_ELEMENTS // block_w)
    _copy_rows_kernel[(triton.cdiv(count, block_r), planes[1] - planes[0], triton.cdiv(width, block_w))](
        pages, arena, slots, base, tokens, start, count, pages.stride(1), planes[0],
        WIDTH=width, BLOCK_R=block_r, BLOCK_W=block_w, TO_PAGES=to_pages, STAGING=staging, num_warps=_WARPS,
    )  # fmt: skip


def gather_extent(
    pages: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor, dst_base: torch.Tensor, span_tokens: torch.Tensor,
    layer_start: int, layer_stop: int,
) -> None:  # fmt: skip
    """See ``kernels.rotate_scatter.gather_extent_reference``."""
    _copy_rows(pages, arena, slots, dst_base, span_tokens, 0, (2 * layer_start, 2 * layer_stop), False, False)


def pack_rows(pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor, dst_base: int) -> None:
    """See ``kernels.pack.pack_rows_reference``."""
    _copy_rows(pages, arena, slots, slots, slots, dst_base, (0, 2 * pages.shape[0]), False, True)


def unpack_rows(arena: torch.Tensor, src_base: int, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """See ``kernels.pack.unpack_rows_reference``."""
    _copy_rows(pages, arena, slots, slots, slots, src_base, (0, 2 * pages.shape[0]), True, True)
