"""Extents to pages and back in torch.

An extent is ``[layer, 2, token, kv_head, head_dim]`` inside a flat arena; a token is addressed by the element offset
of its K row in layer 0 (``base``) and its span's length (``tokens``): K of layer l is at
``base + 2*l*tokens*kv_row``, V ``tokens*kv_row`` after it.
"""

from __future__ import annotations

import torch

from vlcache_dist.kernels.rope import rotate_reference


def _rows(base: torch.Tensor, tokens: torch.Tensor, layer: int, which: int, width: int) -> torch.Tensor:
    """Element offsets int64 [N, width] of K (which = 0) or V (1) of one layer."""
    start = base + (2 * layer + which) * tokens * width
    return start[:, None] + torch.arange(width, device=base.device)


def rotate_scatter_reference(
    arena: torch.Tensor,
    pages: torch.Tensor,
    src_base: torch.Tensor,
    span_tokens: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layer_start: int,
    layer_stop: int,
) -> None:
    """Copy N cached tokens into the pages in layers [layer_start, layer_stop): K rotated, V as is.

    arena 1-D; pages [L, 2, NB, BS, Hkv, D] of the arena's dtype; src_base, span_tokens, slots int64 [N], a negative
    slot is not written; cos, sin fp32 [N, D/2].
    """
    live = slots >= 0
    if not bool(live.all()):
        src_base, span_tokens, slots, cos, sin = (x[live] for x in (src_base, span_tokens, slots, cos, sin))
    heads, dim = pages.shape[-2:]
    for layer in range(layer_start, layer_stop):
        k = arena[_rows(src_base, span_tokens, layer, 0, heads * dim)].view(-1, heads, dim)
        v = arena[_rows(src_base, span_tokens, layer, 1, heads * dim)].view(-1, heads, dim)
        pages[layer, 0].view(-1, heads, dim)[slots] = rotate_reference(k, cos, sin)
        pages[layer, 1].view(-1, heads, dim)[slots] = v


def gather_extent_reference(
    pages: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    dst_base: torch.Tensor,
    span_tokens: torch.Tensor,
    layer_start: int,
    layer_stop: int,
) -> None:
    """The inverse way without rotation: N tokens' K and V as they lie in the pages into extents.

    Arguments as in ``rotate_scatter_reference``; ``dst_base`` addresses the extents; a negative slot is skipped.
    """
    live = slots >= 0
    if not bool(live.all()):
        dst_base, span_tokens, slots = dst_base[live], span_tokens[live], slots[live]
    heads, dim = pages.shape[-2:]
    for layer in range(layer_start, layer_stop):
        for which in (0, 1):
            rows = pages[layer, which].view(-1, heads * dim)[slots]
            arena[_rows(dst_base, span_tokens, layer, which, heads * dim)] = rows
