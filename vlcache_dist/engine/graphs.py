"""Small forward passes replayed from CUDA graphs: decode, and warm prefill.

A warm prefill of a few hundred rows takes some 5 ms on the GPU and three times as long to launch kernel by kernel; in a
graph the launches cost nothing. A graph is captured for a *shape*, at its first use, and a step is padded to the least
shape that holds it. Padding rows write nowhere (slot -1) and attend to block 0, which is finite whatever it holds.

Only steps in which every row goes through every layer qualify (text, decode, uniform plans) and nothing is recorded:
what shrinks from layer to layer, and cold prefill, is launched kernel by kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.model.batch import ForwardBatch
from vlcache_dist.model.language import LanguageModel

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
MAX_GRAPHS = 96
LEAST_KEYS = 2048
_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for: ``rows`` of which the first ``samples`` are sampled, ``segments``, the block
    table's ``width``, and bounds of queries per segment and of keys."""

    rows: int
    samples: int
    segments: int
    width: int
    max_q: int
    max_kv: int


@dataclass(slots=True)
class PaddedStep:
    """A step's arrays in a shape. ``embed_mask``: rows whose input is encoder output."""

    token_ids: np.ndarray  # int64 [rows]
    slots: np.ndarray  # int64 [rows]
    embed_offset: np.ndarray  # int64 [rows]
    positions: np.ndarray  # int32 [3, rows]
    cu_q: np.ndarray  # int32 [segments + 1]
    kv_len: np.ndarray  # int32 [segments]
    block_table: np.ndarray  # int32 [segments, width]
    embed_mask: np.ndarray  # bool [rows]

    def arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.token_ids,
            self.slots,
            self.embed_offset,
            self.positions,
            self.cu_q,
            self.kv_len,
            self.block_table,
            self.embed_mask,
        )


def shape_for(step: StepBatch) -> Shape | None:
    """The least shape that holds a step; None if it must be launched kernel by kernel."""
    rows, samples = len(step.token_ids), step.num_samples
    uniform = all(n == rows for n in step.rows_kv) and all(n == rows for n in step.rows_q[:-1])
    if not samples or not uniform or step.rows_q[-1] != samples or (step.record_base >= 0).any():
        return None
    padded_samples = _at_least(samples, ROWS)
    others = rows - samples
    padded_rows = None if padded_samples is None else _at_least(padded_samples + others, ROWS)
    if padded_samples is None or padded_rows is None:
        return None
    max_q, segments = 1, padded_samples
    if others:
        max_q = _power_of_two(max(step.max_q[0], padded_rows - padded_samples - others))
        segments += _power_of_two(len(step.kv_len) - samples + 1)
    return Shape(
        rows=padded_rows,
        samples=padded_samples,
        segments=segments,
        width=_power_of_two(step.block_table.shape[1]),
        max_q=max_q,
        max_kv=max(LEAST_KEYS, _power_of_two(step.max_kv)),
    )


def pad_step(step: StepBatch, shape: Shape) -> PaddedStep:
    """Sampled rows first, padded to ``shape.samples``; then the others; then padding rows as one segment."""
    rows, samples, segments = len(step.token_ids), step.num_samples, len(step.kv_len)
    others = rows - samples
    end = shape.samples + others
    where = np.concatenate((np.arange(samples), np.arange(shape.samples, end)))
    token_ids = np.zeros(shape.rows, np.int64)
    slots = np.full(shape.rows, -1, np.int64)
    embed_offset = np.zeros(shape.rows, np.int64)
    positions = np.zeros((3, shape.rows), np.int32)
    embed_mask = np.zeros(shape.rows, bool)
    token_ids[where], slots[where], positions[:, where] = step.token_ids, step.slots, step.positions
    embed_offset[where[step.embed_rows]] = step.embed_offset
    embed_mask[where[step.embed_rows]] = True

    cu_q = np.full(shape.segments + 1, shape.rows, np.int32)
    kv_len = np.zeros(shape.segments, np.int32)
    table = np.zeros((shape.segments, shape.width), np.int32)
    width = step.block_table.shape[1]
    cu_q[: shape.samples + 1] = np.arange(shape.samples + 1)
    kv_len[: shape.samples] = 1
    kv_len[:samples] = step.kv_len[:samples]
    table[:samples, :width] = step.block_table[:samples]
    after = shape.samples + segments - samples
    cu_q[shape.samples : after + 1] = step.cu_q[samples:] + (shape.samples - samples)
    kv_len[shape.samples : after] = step.kv_len[samples:]
    table[shape.samples : after, :width] = step.block_table[samples:]
    if after < shape.segments:
        kv_len[after] = shape.rows - end
    return PaddedStep(token_ids, slots, embed_offset, positions, cu_q, kv_len, table, embed_mask)


def forward_batch(tensors: Sequence[torch.Tensor], shape: Shape, num_layers: int) -> ForwardBatch:
    """The padded step's tensors (in the order of ``PaddedStep.arrays``) as a model's input; encoder output is put in by
    ``embed_padded``."""
    token_ids, slots, _, positions, cu_q, kv_len, block_table, _ = tensors
    empty = torch.empty(0, dtype=torch.int64, device=token_ids.device)
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        embed_rows=empty,
        embed_offset=empty,
        record_base=empty,
        record_tokens=empty,
        cu_q=cu_q,
        kv_len=kv_len,
        block_table=block_table,
        rows_kv=(shape.rows,) * num_layers,
        rows_q=(*(shape.rows,) * (num_layers - 1), shape.samples),
        segs_q=(*(shape.segments,) * (num_layers - 1), shape.samples),
        max_q=(*(shape.max_q,) * (num_layers - 1), 1),
        max_kv=shape.max_kv,
        num_samples=shape.samples,
        any_record=False,
    )


@torch.inference_mode()
def padded_logits(
    model: LanguageModel, tensors: Sequence[torch.Tensor], shape: Shape, pages: torch.Tensor, arena: torch.Tensor
) -> torch.Tensor:
    """fp32 [samples, vocab]; writes K and V of the real rows. What a graph captures; runs anywhere."""
    batch = forward_batch(tensors, shape, model.config.num_layers)
    x = F.embedding(batch.token_ids, model.embed_tokens)
    encoded = arena.unfold(0, x.shape[1], 1)[tensors[2]].to(x.dtype)
    x = torch.where(tensors[7][:, None], encoded, x)
    return model.logits(model.run_layers(x, batch, pages, None, 0, model.config.num_layers))


class _Graph:
    """One captured shape with its input buffers and its output."""

    def __init__(self, shape: Shape, example: PaddedStep, device: torch.device) -> None:
        self.shape = shape
        self._places: list[tuple[int, np.dtype, tuple[int, ...]]] = []
        total = 0
        for array in example.arrays():
            self._places.append((total, array.dtype, array.shape))
            total += -(-array.nbytes // _ALIGN) * _ALIGN
        self._bytes = total
        self._inputs = torch.zeros(total, dtype=torch.uint8, device=device)
        self.tensors = [
            self._inputs[start : start + int(np.prod(shape)) * dtype.itemsize]
            .view(torch.from_numpy(np.empty(0, dtype)).dtype)
            .view(shape)
            for start, dtype, shape in self._places
        ]
        self.graph = torch.cuda.CUDAGraph()
        self.logits: torch.Tensor | None = None

    def fill(self, step: PaddedStep) -> None:
        """One asynchronous copy from pinned memory."""
        host = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=True)
        flat = host.numpy()
        for array, (start, _, _) in zip(step.arrays(), self._places, strict=True):
            flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._inputs.copy_(host, non_blocking=True)


class GraphedForward:
    """Graphs of one model over one set of pages and one arena. One thread owns it."""

    def __init__(self, model: LanguageModel, pages: torch.Tensor, arena: torch.Tensor) -> None:
        self._model = model
        self._pages = pages
        self._arena = arena
        self._graphs: dict[Shape, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def logits(self, step: StepBatch) -> torch.Tensor | None:
        """fp32 [num_samples, vocab], valid until the next call; None if the step does not fit any graph. Reused tokens
        must have been scattered before."""
        shape = shape_for(step)
        if shape is None:
            return None
        graph = self._graphs.get(shape)
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                return None
            graph = self._capture(shape, pad_step(step, shape))
        graph.fill(pad_step(step, shape))
        graph.graph.replay()
        assert graph.logits is not None
        return graph.logits[: step.num_samples]

    def _capture(self, shape: Shape, step: PaddedStep) -> _Graph:
        """Run once for the sake of lazy compilation, then capture. Running writes what the step would write."""
        log.info("capturing %s", shape)
        graph = _Graph(shape, step, self._pages.device)
        graph.fill(step)
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            padded_logits(self._model, graph.tensors, shape, self._pages, self._arena)
        current.wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph.graph, pool=self._pool):
            graph.logits = padded_logits(self._model, graph.tensors, shape, self._pages, self._arena)
        self._graphs[shape] = graph
        return graph


def _at_least(count: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if size >= count), None)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
