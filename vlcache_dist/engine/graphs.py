"""Forward passes replayed from CUDA graphs: decode, warm prefill, and cold prefill of small images.

A warm prefill of a few hundred rows takes some 5 ms on the GPU and three times as long to launch kernel by kernel; in a
graph the launches cost nothing. A graph is captured for a *shape*, at its second use (at the first the step is launched
kernel by kernel, so that a shape that never comes back costs nothing), and a step is padded to the least shape that
holds it. Padding rows write nowhere (slot -1) and attend to block 0, which is finite whatever it holds.

Scattering the reused tokens, recording, and drawing the likeliest tokens are in the graph, so that such a step is one
copy to the device, one launch and one copy back. Only steps in which every row goes through every layer qualify
(text, decode, fresh images, uniform plans): what shrinks from layer to layer is launched kernel by kernel, and so are
large passes, whose kernels hide the launches.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.upload import FixedInputs

log = logging.getLogger(__name__)

ROWS = (
    *(1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024),
    *range(1152, 2049, 128),
)
MAX_GRAPHS = 96
LEAST_KEYS = 2048
LEAST_SCATTER = 256
_REMEMBERED = 1024  #: shapes seen once


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for: ``rows`` of which the first ``samples`` are sampled, ``segments``, the block
    table's ``width``, bounds of queries per segment and of keys, reused tokens that are scattered first, and whether
    rows are recorded."""

    rows: int
    samples: int
    segments: int
    width: int
    max_q: int
    max_kv: int
    scatter: int
    recording: bool


@dataclass(slots=True)
class PaddedStep:
    """A step's arrays in a shape, in the order in which they travel. ``embed_mask``: rows whose input is encoder
    output."""

    token_ids: np.ndarray  # int64 [rows]
    slots: np.ndarray  # int64 [rows]
    embed_offset: np.ndarray  # int64 [rows]
    record_base: np.ndarray  # int64 [rows], -1: not recorded
    record_tokens: np.ndarray  # int64 [rows]
    positions: np.ndarray  # int32 [3, rows]
    cu_q: np.ndarray  # int32 [segments + 1]
    kv_len: np.ndarray  # int32 [segments]
    block_table: np.ndarray  # int32 [segments, width]
    embed_mask: np.ndarray  # bool [rows]
    scatter_src: np.ndarray  # int64 [scatter]
    scatter_tokens: np.ndarray  # int64 [scatter]
    scatter_slots: np.ndarray  # int64 [scatter], -1: padding
    scatter_positions: np.ndarray  # int32 [3, scatter]

    @classmethod
    def empty(cls, shape: Shape) -> PaddedStep:
        rows, scatter = shape.rows, shape.scatter
        return cls(
            token_ids=np.empty(rows, np.int64),
            slots=np.empty(rows, np.int64),
            embed_offset=np.empty(rows, np.int64),
            record_base=np.empty(rows, np.int64),
            record_tokens=np.empty(rows, np.int64),
            positions=np.empty((3, rows), np.int32),
            cu_q=np.empty(shape.segments + 1, np.int32),
            kv_len=np.empty(shape.segments, np.int32),
            block_table=np.empty((shape.segments, shape.width), np.int32),
            embed_mask=np.empty(rows, bool),
            scatter_src=np.empty(scatter, np.int64),
            scatter_tokens=np.empty(scatter, np.int64),
            scatter_slots=np.empty(scatter, np.int64),
            scatter_positions=np.empty((3, scatter), np.int32),
        )

    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def shape_for(step: StepBatch) -> Shape | None:
    """The least shape that holds a step; None if it must be launched kernel by kernel."""
    rows, samples = len(step.token_ids), step.num_samples
    if not samples or rows > ROWS[-1] or step.rows_q[-1] != samples:
        return None
    if any(n != rows for n in step.rows_kv) or any(n != rows for n in step.rows_q[:-1]):
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
    scatter = len(step.scatter_src)
    return Shape(
        rows=padded_rows,
        samples=padded_samples,
        segments=segments,
        width=_power_of_two(step.block_table.shape[1]),
        max_q=max_q,
        max_kv=max(LEAST_KEYS, _power_of_two(step.max_kv)),
        scatter=max(LEAST_SCATTER, _power_of_two(scatter)) if scatter else 0,
        recording=bool((step.record_base >= 0).any()),
    )


def pad_step(step: StepBatch, shape: Shape, into: PaddedStep) -> None:
    """Overwrite ``into``: sampled rows first, padded to ``shape.samples``; then the others; then padding rows as one
    segment."""
    rows, samples, segments = len(step.token_ids), step.num_samples, len(step.kv_len)
    gap = shape.samples - samples  # padding between the sampled rows and the others
    end = rows + gap
    for target, source, padding in (
        (into.token_ids, step.token_ids, 0),
        (into.slots, step.slots, -1),
        (into.record_base, step.record_base, -1),
        (into.record_tokens, step.record_tokens, 0),
        (into.positions, step.positions, 0),
    ):
        target[..., :samples] = source[..., :samples]
        target[..., samples : shape.samples] = padding
        target[..., shape.samples : end] = source[..., samples:]
        target[..., end:] = padding
    into.embed_offset[:] = 0
    into.embed_mask[:] = False
    if len(step.embed_rows):
        where = step.embed_rows + gap * (step.embed_rows >= samples)
        into.embed_offset[where] = step.embed_offset
        into.embed_mask[where] = True

    after, width = shape.samples + segments - samples, step.block_table.shape[1]
    into.cu_q[: shape.samples] = np.arange(shape.samples)
    into.cu_q[shape.samples : after + 1] = step.cu_q[samples:] + gap
    into.cu_q[after + 1 :] = shape.rows
    into.kv_len[:samples] = step.kv_len[:samples]
    into.kv_len[samples : shape.samples] = 1
    into.kv_len[shape.samples : after] = step.kv_len[samples:]
    into.kv_len[after:] = 0
    into.block_table[:] = 0
    into.block_table[:samples, :width] = step.block_table[:samples]
    into.block_table[shape.samples : after, :width] = step.block_table[samples:]
    if after < shape.segments:
        into.kv_len[after] = shape.rows - end

    reused = len(step.scatter_src)
    into.scatter_src[:reused], into.scatter_src[reused:] = step.scatter_src, 0
    into.scatter_tokens[:reused], into.scatter_tokens[reused:] = step.scatter_tokens, 0
    into.scatter_slots[:reused], into.scatter_slots[reused:] = step.scatter_slots, -1
    into.scatter_positions[:, :reused], into.scatter_positions[:, reused:] = step.scatter_positions, 0


@torch.inference_mode()
def padded_input(
    model: LanguageModel, tensors: Sequence[torch.Tensor], shape: Shape, arena: torch.Tensor
) -> tuple[torch.Tensor, ForwardBatch, ScatterBatch | None]:
    """What the model works on, of a padded step's ``tensors`` (in the order of ``PaddedStep``): hidden state before
    layer 0, rows, and the reused tokens to be scattered first."""
    step = dict(zip((field.name for field in fields(PaddedStep)), tensors, strict=True))
    layers = model.config.num_layers
    reused = None
    if shape.scatter:
        reused = ScatterBatch(
            step["scatter_src"], step["scatter_tokens"], step["scatter_slots"], step["scatter_positions"]
        )
    empty = torch.empty(0, dtype=torch.int64, device=arena.device)
    batch = ForwardBatch(
        token_ids=step["token_ids"],
        positions=step["positions"],
        slots=step["slots"],
        embed_rows=empty,
        embed_offset=empty,
        record_base=step["record_base"],
        record_tokens=step["record_tokens"],
        cu_q=step["cu_q"],
        kv_len=step["kv_len"],
        block_table=step["block_table"],
        rows_kv=(shape.rows,) * layers,
        rows_q=(*(shape.rows,) * (layers - 1), shape.samples),
        segs_q=(*(shape.segments,) * (layers - 1), shape.samples),
        max_q=(*(shape.max_q,) * (layers - 1), 1),
        max_kv=shape.max_kv,
        num_samples=shape.samples,
        any_record=shape.recording,
    )
    x = F.embedding(batch.token_ids, model.embed_tokens)
    encoded = arena.unfold(0, x.shape[1], 1)[step["embed_offset"]].to(x.dtype)
    return torch.where(step["embed_mask"][:, None], encoded, x), batch, reused


@torch.inference_mode()
def padded_logits(
    model: LanguageModel, tensors: Sequence[torch.Tensor], shape: Shape, pages: torch.Tensor, arena: torch.Tensor
) -> torch.Tensor:
    """fp32 [samples, vocab] of a padded step's ``tensors``; scatters reused tokens, writes K and V of the real rows and
    records them. What a graph captures; runs anywhere."""
    x, batch, reused = padded_input(model, tensors, shape, arena)
    if reused is not None:
        model.scatter(reused, pages, arena, 0, model.config.num_layers)
    return model.logits(model.run_layers(x, batch, pages, arena, 0, model.config.num_layers))


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay leaves on the device, valid until the next one: ``logits`` fp32 [num_samples, vocab] and the
    likeliest token of each row, int64 [num_samples]."""

    logits: torch.Tensor
    likeliest: torch.Tensor


@dataclass(slots=True)
class _Graph:
    """One captured shape with its inputs and outputs."""

    inputs: FixedInputs
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    likeliest: torch.Tensor


class GraphedForward:
    """Graphs of one model over one set of pages and one arena, the least recently used given up beyond ``MAX_GRAPHS``.
    One thread owns it."""

    def __init__(self, model: LanguageModel, pages: torch.Tensor, arena: torch.Tensor) -> None:
        self._model = model
        self._pages = pages
        self._arena = arena
        self._graphs: OrderedDict[Shape, _Graph] = OrderedDict()
        self._seen: OrderedDict[Shape, None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: StepBatch) -> Replayed | None:
        """The whole step, scattering included; None, and nothing is done, if it must be launched kernel by kernel."""
        shape = shape_for(step)
        if shape is None:
            return None
        graph = self._graphs.get(shape)
        if graph is None:
            if shape not in self._seen:
                self._seen[shape] = None
                if len(self._seen) > _REMEMBERED:
                    self._seen.popitem(last=False)
                return None
            graph = self._capture(shape, step)
        self._graphs.move_to_end(shape)
        graph.inputs.wait()
        pad_step(step, shape, PaddedStep(*graph.inputs.arrays))
        graph.inputs.send()
        graph.graph.replay()
        return Replayed(graph.logits[: step.num_samples], graph.likeliest[: step.num_samples])

    def _capture(self, shape: Shape, step: StepBatch) -> _Graph:
        """Run once for the sake of lazy compilation, then capture. Running writes what the step would write."""
        log.info("capturing %s", astuple(shape))
        if len(self._graphs) >= MAX_GRAPHS:
            torch.cuda.synchronize()
            self._graphs.popitem(last=False)
        inputs = FixedInputs(PaddedStep.empty(shape).arrays(), self._pages.device)
        pad_step(step, shape, PaddedStep(*inputs.arrays))
        inputs.send()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._forward(inputs, shape)
        current.wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process (the vision tower's, say) go on allocating meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits, likeliest = self._forward(inputs, shape)
        captured = self._graphs[shape] = _Graph(inputs, graph, logits, likeliest)
        return captured

    def _forward(self, inputs: FixedInputs, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        logits = padded_logits(self._model, inputs.tensors, shape, self._pages, self._arena)
        return logits, logits.argmax(-1)


def _at_least(count: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if size >= count), None)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
