"""The vision tower replayed from CUDA graphs for small batches, whose kernels take less time than launching them.

A graph is captured for a *shape*, at its third use (a camera's or a screen's pictures are all of one size; capturing
takes longer than launching a few times), and a batch is padded to the least shape that holds it. Padding
patches form windows and a frame of their own, so every row is computed, from finite values, and none meets an image's.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch

from vlcache_dist.model.capture import captured
from vlcache_dist.model.upload import FixedInputs
from vlcache_dist.model.vision_layout import VisionLayout

log = logging.getLogger(__name__)

MOST_PATCHES = 8192  #: beyond it kernels hide their launches
MAX_GRAPHS = 32
PATIENCE = 3  #: uses after which a shape is captured

#: (patches, order, row_column, windows, frames, longest_window, longest_frame) -> merged tokens in permuted order
Encode = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class VisionShape:
    """What a graph is captured for; ``frames`` counts the padding's."""

    patches: int
    windows: int
    frames: int
    longest_window: int
    longest_frame: int

    def arrays(self, merged: int) -> tuple[np.ndarray, ...]:
        """Empty inputs of a graph with ``merged`` patches per token, as ``pad_layout`` fills them."""
        return (
            np.empty(self.patches // merged, np.int64),
            np.empty((2, self.patches), np.int32),
            np.empty(self.windows + 1, np.int32),
            np.empty(self.frames + 1, np.int32),
        )


def vision_shape(layout: VisionLayout, merged: int) -> VisionShape | None:
    """The least shape for a batch of ``merged`` patches per token; None if it is too large to be worth it."""
    patches = layout.row_column.shape[1]
    step = merged * (64 if patches <= MOST_PATCHES // 4 else 128)
    rows = -(-patches // step) * step
    if rows > MOST_PATCHES:
        return None
    spare = rows - patches
    windows = len(layout.windows) - 1 + -(-spare // layout.longest_window)
    longest_frame = max(layout.longest_frame, spare)
    return VisionShape(
        patches=rows,
        windows=1 << (windows - 1).bit_length(),
        frames=len(layout.frames) - 1 + (spare > 0),
        longest_window=layout.longest_window,
        longest_frame=min(-(-longest_frame // step) * step, rows),
    )


def pad_layout(layout: VisionLayout, shape: VisionShape, into: Sequence[np.ndarray]) -> None:
    """Overwrite ``into``: order int64 [patches / merged], row_column int32 [2, patches], windows int32 [windows + 1],
    frames int32 [frames + 1]."""
    order, row_column, windows, frames = into
    patches, tokens = layout.row_column.shape[1], len(layout.order)
    order[:tokens], order[tokens:] = layout.order, np.arange(tokens, len(order))
    row_column[:, :patches], row_column[:, patches:] = layout.row_column, 0
    used = len(layout.windows)
    windows[:used] = layout.windows
    windows[used:] = np.minimum(patches + layout.longest_window * np.arange(1, len(windows) - used + 1), shape.patches)
    frames[: len(layout.frames)], frames[len(layout.frames) :] = layout.frames, shape.patches


@dataclass(slots=True)
class _Graph:
    inputs: FixedInputs
    graph: torch.cuda.CUDAGraph
    out: torch.Tensor


class GraphedTower:
    """Graphs of one tower's ``encode``. One thread at a time, always on the same stream."""

    def __init__(self, encode: Encode, patch_elements: int, device: torch.device, dtype: torch.dtype) -> None:
        self._encode = encode
        self._device = device
        self._pixels = torch.zeros(MOST_PATCHES, patch_elements, device=device, dtype=dtype)
        self._graphs: OrderedDict[VisionShape, _Graph] = OrderedDict()
        self._uses: Counter[VisionShape] = Counter()  # without a graph
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, patches: torch.Tensor, layout: VisionLayout) -> torch.Tensor | None:
        """patches [N, patch_elements] on the device -> [N / merged, out_hidden_size] in permuted order, valid until the
        next call; None if the batch is to be launched kernel by kernel."""
        shape = vision_shape(layout, len(patches) // len(layout.order))
        if shape is None:
            return None
        graph = self._graphs.get(shape)
        if graph is None:
            self._uses[shape] += 1
            if self._uses[shape] < PATIENCE:
                return None
            del self._uses[shape]
        self._pixels[: len(patches)].copy_(patches)
        if graph is None:
            graph = self._capture(shape, layout)
        self._graphs.move_to_end(shape)
        graph.inputs.wait()
        pad_layout(layout, shape, graph.inputs.arrays)
        graph.inputs.send()
        graph.graph.replay()
        return graph.out[: len(layout.order)]

    def _capture(self, shape: VisionShape, layout: VisionLayout) -> _Graph:
        log.info("capturing %s", astuple(shape))
        if len(self._graphs) >= MAX_GRAPHS:
            torch.cuda.synchronize()
            self._graphs.popitem(last=False)
        merged = layout.row_column.shape[1] // len(layout.order)
        inputs = FixedInputs(shape.arrays(merged), self._device)
        pad_layout(layout, shape, inputs.arrays)
        inputs.send()
        graph, out = captured(lambda: self._forward(inputs, shape), self._pool)
        self._graphs[shape] = _Graph(inputs, graph, out)
        return self._graphs[shape]

    def _forward(self, inputs: FixedInputs, shape: VisionShape) -> torch.Tensor:
        pixels = self._pixels[: shape.patches]
        return self._encode(pixels, *inputs.tensors, shape.longest_window, shape.longest_frame)
