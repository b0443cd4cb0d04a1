"""The functions of ``kernels`` other than attention: Triton or torch, by the device of the first tensor."""

from __future__ import annotations

import torch

from vlcache_dist.kernels import activation, checksum, kv_write, norm, pack, rope
from vlcache_dist.kernels import linear as products
from vlcache_dist.kernels import rotate_scatter as extents
from vlcache_dist.kernels.dispatch import uses_triton


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: x [R, H, D], cos and sin fp32 [R, D/2] -> [R, H, D]. See ``rope.rotate_reference``.

    One call can rotate queries and keys of a fused projection together: pass their heads side by side."""
    if uses_triton(x):
        from vlcache_dist.kernels.gpu import rope as gpu

        return gpu.rotate(x, cos, sin)
    return rope.rotate_reference(x, cos, sin)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor,
    v_pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor | None, record_base: torch.Tensor,
    record_tokens: torch.Tensor, layer: int,
) -> None:  # fmt: skip
    """Fresh K and V of one layer to the pages (and to the extents being recorded). See
    ``kv_write.write_kv_reference``."""
    args = (k, v, cos, sin, k_pages, v_pages, slots, arena, record_base, record_tokens, layer)
    if uses_triton(k):
        from vlcache_dist.kernels.gpu import rope as gpu

        gpu.write_kv(*args)
    else:
        kv_write.write_kv_reference(*args)


def rotate_and_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor,
    v_pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor | None, record_base: torch.Tensor,
    record_tokens: torch.Tensor, layer: int,
) -> torch.Tensor:  # fmt: skip
    """``write_kv`` and the rotation of the first Rq rows' queries in one launch: -> [Rq, Hq, D]. See
    ``kv_write.rotate_and_write_reference``."""
    args = (q, k, v, cos, sin, k_pages, v_pages, slots, arena, record_base, record_tokens, layer)
    if uses_triton(k):
        from vlcache_dist.kernels.gpu import rope as gpu

        return gpu.rotate_and_write(*args)
    return kv_write.rotate_and_write_reference(*args)


def rotate_scatter(
    arena: torch.Tensor, pages: torch.Tensor, src_base: torch.Tensor, span_tokens: torch.Tensor, slots: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, layer_start: int, layer_stop: int,
) -> None:  # fmt: skip
    """Reused tokens from extents to pages, K rotated. See ``rotate_scatter.rotate_scatter_reference``."""
    args = (arena, pages, src_base, span_tokens, slots, cos, sin, layer_start, layer_stop)
    if uses_triton(pages):
        from vlcache_dist.kernels.gpu import extents as gpu

        gpu.rotate_scatter(*args)
    else:
        extents.rotate_scatter_reference(*args)


def gather_extent(
    pages: torch.Tensor, arena: torch.Tensor, slots: torch.Tensor, dst_base: torch.Tensor, span_tokens: torch.Tensor,
    layer_start: int, layer_stop: int,
) -> None:  # fmt: skip
    """Tokens from pages to extents as they are. See ``rotate_scatter.gather_extent_reference``."""
    args = (pages, arena, slots, dst_base, span_tokens, layer_start, layer_stop)
    if uses_triton(pages):
        from vlcache_dist.kernels.gpu import extents as gpu

        gpu.gather_extent(*args)
    else:
        extents.gather_extent_reference(*args)


def pack_rows(pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor, dst_base: int) -> None:
    """Slots of the pages, every layer, to a staging extent. See ``pack.pack_rows_reference``."""
    if uses_triton(pages):
        from vlcache_dist.kernels.gpu import extents as gpu

        gpu.pack_rows(pages, slots, arena, dst_base)
    else:
        pack.pack_rows_reference(pages, slots, arena, dst_base)


def unpack_rows(arena: torch.Tensor, src_base: int, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """A staging extent to slots of the pages. See ``pack.unpack_rows_reference``."""
    if uses_triton(pages):
        from vlcache_dist.kernels.gpu import extents as gpu

        gpu.unpack_rows(arena, src_base, pages, slots)
    else:
        pack.unpack_rows_reference(arena, src_base, pages, slots)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., C], weight [C] -> [..., C]. See ``norm.rms_norm_reference``."""
    if uses_triton(x):
        from vlcache_dist.kernels.gpu import pointwise as gpu

        return gpu.rms_norm(x, weight, eps)
    return norm.rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), [R, C] each. See ``norm.add_rms_norm_reference``."""
    if uses_triton(x):
        from vlcache_dist.kernels.gpu import pointwise as gpu

        return gpu.add_rms_norm(x, residual, weight, eps)
    return norm.add_rms_norm_reference(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2*I] -> silu(gate) * up [..., I]. See ``activation.silu_mul_reference``."""
    if uses_triton(gate_up):
        from vlcache_dist.kernels.gpu import pointwise as gpu

        return gpu.silu_mul(gate_up)
    return activation.silu_mul_reference(gate_up)


def word_sums(words: torch.Tensor) -> torch.Tensor:
    """What a range of memory holds: int32 [n] -> int64 [2]. See ``checksum.word_sums_reference``."""
    if uses_triton(words):
        from vlcache_dist.kernels.gpu import checksum as gpu

        return gpu.word_sums(words)
    return checksum.word_sums_reference(words)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, C] times weight [O, C]: a kernel of its own for one row of 16 bits, the library's otherwise. See
    ``linear.linear_reference``."""
    if _one_row(x):
        from vlcache_dist.kernels.gpu import gemv as gpu

        return gpu.gemv(x, weight, bias)
    return products.linear_reference(x, weight, bias)


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, C] through the gated half of an MLP: -> [R, I]. One launch for one row, and where that was measured to be
    ahead of the library's product. See ``linear.swiglu_reference``."""
    if uses_triton(x):
        from vlcache_dist.kernels.gpu import gemv
        from vlcache_dist.kernels.gpu import swiglu as gpu

        if bias is None and _one_row(x):
            return gemv.gated_gemv(x, gate_up)
        if (config := gpu.chosen(x, gate_up)) is not None:
            return gpu.swiglu(x, gate_up, bias, config)
    return silu_mul(products.linear_reference(x, gate_up, bias))


def compile_swiglu(gate_up: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Compile what ``swiglu`` of many rows through this weight needs, if it is ours."""
    if uses_triton(gate_up):
        from vlcache_dist.kernels.gpu import swiglu as gpu

        gpu.compile_ahead(gate_up, bias)


def _one_row(x: torch.Tensor) -> bool:
    return len(x) == 1 and x.element_size() == 2 and uses_triton(x)
