"""The vision tower on padded batches computes what it does on unpadded ones; on a GPU, its graphs do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlcache_dist.bench.shapes import random_models
from vlcache_dist.model.upload import FixedInputs
from vlcache_dist.model.vision import VisionTower
from vlcache_dist.model.vision_graphs import MOST_PATCHES, pad_layout, vision_shape
from vlcache_dist.model.vision_layout import Grid, VisionLayout, vision_layout
from vlcache_dist.model.weights import BUNDLED, Checkpoint

CONFIG = Checkpoint.open(BUNDLED).config
GRIDS: list[list[Grid]] = [
    [(1, 8, 8)],
    [(1, 12, 20), (1, 4, 4)],
    [(2, 16, 12)],
    [(1, 32, 32), (1, 28, 36), (1, 8, 8)],
]


def tower(device: str, dtype: torch.dtype) -> VisionTower:
    return random_models(CONFIG, torch.device(device), dtype)[1]


def laid_out(grids: list[Grid]) -> VisionLayout:
    return vision_layout(tuple(grids), CONFIG.vision)


def patches(grids: list[Grid]) -> torch.Tensor:
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, CONFIG.vision.patch_elements, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("grids", GRIDS)
def test_padding_changes_nothing(grids: list[Grid]) -> None:
    model, layout, pixels = tower("cpu", torch.float32), laid_out(grids), patches(grids)
    shape = vision_shape(layout, CONFIG.vision.spatial_merge_size**2)
    assert shape is not None and shape.patches >= len(pixels)
    inputs = FixedInputs(shape.arrays(CONFIG.vision.spatial_merge_size**2), torch.device("cpu"))
    for array in inputs.arrays:
        array[...] = 1  # traces of another batch
    pad_layout(layout, shape, inputs.arrays)
    inputs.send()
    stale = torch.randn(shape.patches, pixels.shape[1])
    stale[: len(pixels)] = pixels
    rows = model._encode(stale, *inputs.tensors, shape.longest_window, shape.longest_frame)
    expected = model.forward(pixels, grids)
    torch.testing.assert_close(rows[: len(layout.order)][layout.inverse], expected, rtol=1e-4, atol=1e-4)
    windows, frames = inputs.arrays[2], inputs.arrays[3]
    assert windows[-1] == frames[-1] == shape.patches and (np.diff(windows) >= 0).all()
    assert np.diff(windows).max() <= shape.longest_window and np.diff(frames).max() <= shape.longest_frame


def test_large_batches_are_launched_kernel_by_kernel() -> None:
    side = 2 * int((MOST_PATCHES / 4) ** 0.5) + 4
    assert vision_shape(laid_out([(1, side, side)]), 4) is None


def test_the_same_shape_serves_pictures_of_about_the_same_size() -> None:
    assert vision_shape(laid_out([(1, 32, 32)]), 4) == vision_shape(laid_out([(1, 32, 32)]), 4)
    several = {vision_shape(laid_out([(1, h, w)]), 4) for h in range(28, 60, 4) for w in range(28, 60, 4)}
    assert len(several) < 40, "64 sizes must share graphs"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("grids", GRIDS)
def test_graphs_replay_what_is_launched(grids: list[Grid]) -> None:
    model, pixels = tower("cuda", torch.bfloat16), patches(grids)
    launched = model.forward(pixels, grids).clone()
    for _ in range(2):
        model.forward(patches([(1, 8, 8)]), [(1, 8, 8)])
        torch.testing.assert_close(model.forward(pixels, grids), launched, rtol=2e-2, atol=2e-2)
