"""The vision tower replayed from CUDA graphs for small batches, whose kernels take less time than launching them.

A graph is captured for a *shape*, and a batch is padded to a shape that holds it: sizes in coarse steps are captured at
start, others when nobody waits (``model.graph_policy``); a camera's or a screen's pictures are all of one size. Padding
patches form windows and a frame of their own, so every row is computed, from finite values, and none meets an image's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch

from vlcache_dist.model.capture import captured
from vlcache_dist.model.graph_policy import GraphPolicy, GraphReport
from vlcache_dist.model.upload import FixedInputs
from vlcache_dist.model.vision_layout import VisionLayout

log = logging.getLogger(__name__)

MOST_PATCHES = 8192  #: beyond it kernels hide their launches
MAX_GRAPHS = 48
AHEAD = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  #: patches of the shapes to be captured at start
_WINDOW = 64  # patches

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


def shapes_ahead(merged: int) -> list[VisionShape]:
    """Few shapes that hold most batches of one to three pictures, with twice the windows that whole ones make."""
    return [VisionShape(n, 2 * n // _WINDOW, 4, _WINDOW, n) for n in AHEAD if n % merged == 0]


def holds(graph: VisionShape, batch: VisionShape) -> bool:
    """True if a batch of least shape ``batch`` can be padded to ``graph``, and if that is faster than launching it
    kernel by kernel, which takes as long as some 6,000 patches (H200)."""
    spare = graph.patches - batch.patches
    return (
        spare >= 0
        and graph.longest_frame == graph.patches <= max(6144, 3 * batch.patches // 2)
        and graph.longest_window >= batch.longest_window
        and graph.windows >= batch.windows + spare // batch.longest_window + 1
        and graph.frames > batch.frames
    )


def _cost(graph: VisionShape) -> tuple[int, int]:
    return graph.patches, graph.windows


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


def fill_padding(shape: VisionShape, into: Sequence[np.ndarray]) -> None:
    """Overwrite ``into`` (see ``pad_layout``) with padding alone."""
    order, row_column, windows, frames = into
    order[:] = np.arange(len(order))
    row_column[:] = 0
    windows[:] = np.minimum(shape.longest_window * np.arange(len(windows)), shape.patches)
    windows[-1] = shape.patches
    frames[:] = shape.patches
    frames[0] = 0


@dataclass(slots=True)
class _Graph:
    inputs: FixedInputs
    graph: torch.cuda.CUDAGraph
    out: torch.Tensor


class GraphedTower:
    """Graphs of one tower's ``encode``; ``merged`` patches per token. One thread at a time, on one stream."""

    def __init__(
        self, encode: Encode, patch_elements: int, merged: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._encode = encode
        self._merged = merged
        self._device = device
        self._pixels = torch.zeros(MOST_PATCHES, patch_elements, device=device, dtype=dtype)
        self._policy: GraphPolicy[VisionShape] = GraphPolicy(holds, _cost, MAX_GRAPHS)
        self._policy.plan(shapes_ahead(merged))
        self._graphs: dict[VisionShape, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, patches: torch.Tensor, layout: VisionLayout) -> torch.Tensor | None:
        """patches [N, patch_elements] on the device -> [N / merged, out_hidden_size] in permuted order, valid until the
        next call; None if the batch is to be launched kernel by kernel."""
        least = vision_shape(layout, self._merged)
        shape = None if least is None else self._policy.use(least)
        if shape is None:
            return None
        graph = self._graphs[shape]
        self._pixels[: len(patches)].copy_(patches)
        graph.inputs.wait()
        pad_layout(layout, shape, graph.inputs.arrays)
        graph.inputs.send()
        graph.graph.replay()
        return graph.out[: len(layout.order)]

    def capture_next(self) -> bool:
        """Capture one graph; False if none is wanted."""
        shape = self._policy.next()
        if shape is None:
            return False
        log.info("capturing %s", astuple(shape))
        if (old := self._policy.make_room()) is not None:
            torch.cuda.synchronize()
            del self._graphs[old]
        started = time.perf_counter()
        try:
            self._graphs[shape] = self._make(shape)
        except torch.OutOfMemoryError as error:
            log.warning("no memory for the graph of %s, such pictures are launched kernel by kernel: %s", shape, error)
            self._policy.give_up(shape)
        else:
            self._policy.captured(shape, time.perf_counter() - started)
        return True

    def report(self) -> GraphReport:
        return self._policy.report()

    def _make(self, shape: VisionShape) -> _Graph:
        inputs = FixedInputs(shape.arrays(self._merged), self._device)
        fill_padding(shape, inputs.arrays)
        inputs.send()
        graph, out = captured(lambda: self._forward(inputs, shape), self._pool)
        return _Graph(inputs, graph, out)

    def _forward(self, inputs: FixedInputs, shape: VisionShape) -> torch.Tensor:
        pixels = self._pixels[: shape.patches]
        return self._encode(pixels, *inputs.tensors, shape.longest_window, shape.longest_frame)
