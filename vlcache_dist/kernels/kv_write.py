"""Writing fresh K and V in torch: rotated K to the pages, unrotated K and V to an extent that is being recorded."""

from __future__ import annotations

import torch

from vlcache_dist.kernels.rope import rotate_reference


def write_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    arena: torch.Tensor | None,
    record_base: torch.Tensor,
    record_tokens: torch.Tensor,
    layer: int,
) -> None:
    """Store R tokens' K (unrotated) and V of one layer.

    k, v [R, Hkv, D]; cos, sin fp32 [R, D/2]; k_pages, v_pages [NB, BS, Hkv, D] of this layer; slots int64 [R], a
    negative slot is not written; arena 1-D or None (nothing is recorded); record_base, record_tokens int64 [R] as in
    ``model.batch.ForwardBatch``, a negative base is not recorded. K is rounded to the pages' dtype before it is
    rotated, so that a hit at the same positions writes the same bits.
    """
    k, v = k.to(k_pages.dtype), v.to(v_pages.dtype)
    live = slots >= 0
    index, keep = slots[live], (Ellipsis if bool(live.all()) else live)
    k_pages.view(-1, *k_pages.shape[2:])[index] = rotate_reference(k, cos, sin)[keep]
    v_pages.view(-1, *v_pages.shape[2:])[index] = v[keep]
    if arena is None:
        return
    rows = torch.nonzero(record_base >= 0)[:, 0]
    if len(rows):
        width = k.shape[1] * k.shape[2]
        tokens = record_tokens[rows]
        base = record_base[rows] + 2 * layer * tokens * width
        column = torch.arange(width, device=k.device)
        arena[base[:, None] + column] = k[rows].reshape(-1, width)
        arena[(base + tokens * width)[:, None] + column] = v[rows].reshape(-1, width)


def rotate_and_write_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    arena: torch.Tensor | None,
    record_base: torch.Tensor,
    record_tokens: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """``write_kv`` of all R rows and the rotation of the first Rq <= R rows' queries: q [Rq, Hq, D] -> [Rq, Hq, D]."""
    write_kv_reference(k, v, cos, sin, k_pages, v_pages, slots, arena, record_base, record_tokens, layer)
    return rotate_reference(q, cos[: len(q)], sin[: len(q)])
