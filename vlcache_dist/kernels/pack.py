"""Pages to a contiguous staging extent and back in torch: ``[layer, 2, row, kv_head, head_dim]``, as is."""

from __future__ import annotations

import torch


def _staging(arena: torch.Tensor, base: int, pages: torch.Tensor, rows: int) -> torch.Tensor:
    """View of the staging extent as [L, 2, rows, Hkv * D]."""
    layers, width = pages.shape[0], pages.shape[-2] * pages.shape[-1]
    return arena[base : base + layers * 2 * rows * width].view(layers, 2, rows, width)


def _flat(pages: torch.Tensor) -> torch.Tensor:
    return pages.view(pages.shape[0], 2, -1, pages.shape[-2] * pages.shape[-1])


def pack_rows_reference(pages: torch.Tensor, slots: torch.Tensor, arena: torch.Tensor, dst_base: int) -> None:
    """Copy the K and V of N slots (int64 [N], all >= 0), every layer, to the staging extent at element ``dst_base``."""
    _staging(arena, dst_base, pages, len(slots)).copy_(_flat(pages)[:, :, slots])


def unpack_rows_reference(arena: torch.Tensor, src_base: int, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy a staging extent of N rows at element ``src_base`` to N slots (int64 [N], all >= 0) of the pages."""
    _flat(pages)[:, :, slots] = _staging(arena, src_base, pages, len(slots))
