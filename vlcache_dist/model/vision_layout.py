"""The order in which the vision tower sees patches: windows of merged tokens, one after the other. Pure numpy.

The processor delivers an image's patches grouped by *merged token* (``merge**2`` patches that the merger joins), frames
first, then rows, then columns. For window attention whole merged tokens are permuted so that each window is contiguous;
windows never cross frames, so in this order a frame is contiguous too, and serves full attention as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vlcache_dist.model.config import VisionConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """M merged tokens, N = M * merge**2 patches, over all images of a batch.

    ``order``: where the token at each permuted place comes from; ``inverse`` undoes it. ``row_column``: the patch
    coordinates for the 2-D rotary embedding, in permuted order. ``windows`` and ``frames``: cumulative patch counts.
    """

    order: np.ndarray  # int64 [M]
    inverse: np.ndarray  # int64 [M]
    row_column: np.ndarray  # int32 [2, N]
    windows: np.ndarray  # int32 [W + 1]
    frames: np.ndarray  # int32 [F + 1]
    longest_window: int
    longest_frame: int


def vision_layout(grids: Sequence[Grid], config: VisionConfig) -> VisionLayout:
    """Lay out a batch. ``grids``: (t, h, w) in patches. Raises ValueError for sides that the merge does not divide."""
    parts = [_image(tuple(grid), config) for grid in grids]
    starts = np.cumsum([0, *(len(part[0]) for part in parts)])
    order = np.concatenate([part[0] + start for part, start in zip(parts, starts, strict=False)])
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    windows = np.concatenate([part[2] for part in parts])
    frames = np.concatenate([np.full(t, h * w) for t, h, w in grids])
    return VisionLayout(
        order=order,
        inverse=inverse,
        row_column=np.concatenate([part[1] for part in parts], axis=1),
        windows=np.cumsum([0, *windows], dtype=np.int32),
        frames=np.cumsum([0, *frames], dtype=np.int32),
        longest_window=int(windows.max()),
        longest_frame=int(frames.max()),
    )


@lru_cache(maxsize=32)
def _image(grid: Grid, config: VisionConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order int64 [M], row_column int32 [2, N], window lengths in patches int64 [W]) of one image or video."""
    merge, (t, h, w) = config.spatial_merge_size, grid
    if min(grid) < 1 or h % merge or w % merge:
        raise ValueError(f"grid {grid}: positive sides that are multiples of {merge} are expected")
    side = config.window_size // merge // config.patch_size
    frame, row, column = (x.reshape(-1) for x in np.indices((t, h // merge, w // merge)))
    across, down = -(-(w // merge) // side), -(-(h // merge) // side)
    window = (frame * down + row // side) * across + column // side
    order = np.argsort(window, kind="stable")
    inner_row, inner_column = (x.reshape(-1) for x in np.indices((merge, merge)))
    rows = (row[order, None] * merge + inner_row).reshape(-1)
    columns = (column[order, None] * merge + inner_column).reshape(-1)
    return order, np.stack([rows, columns]).astype(np.int32), np.bincount(window) * merge**2
