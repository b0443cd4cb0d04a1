"""Forward passes replayed from CUDA graphs: decode, warm prefill, and cold prefill of small images.

A warm prefill of a few hundred rows takes some 5 ms on the GPU and three times as long to launch kernel by kernel; in a
graph the launches cost nothing. A graph is captured for a *shape* (``engine.graph_shapes``), and a step is padded to a
shape that holds it. Padding rows write nowhere (slot -1) and attend to block 0, which is finite whatever it holds.
Which shapes are captured, and when, says ``model.graph_policy``: never while somebody waits.

Scattering the reused tokens, recording, and drawing the likeliest tokens are in the graph, so that such a step is one
copy to the device, one launch and one copy back. Only steps in which every row goes through every layer qualify
(text, decode, fresh images, uniform plans): what shrinks from layer to layer is launched kernel by kernel, and so are
large passes, whose kernels hide the launches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.graph_shapes import Shape, cost, holds, launched_rows, shape_for, worthwhile
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.capture import captured
from vlcache_dist.model.graph_policy import GraphPolicy, GraphReport
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.upload import FixedInputs

log = logging.getLogger(__name__)

MAX_GRAPHS = 192


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
    near_cu: np.ndarray  # int32 [near_segments + 1]
    kv_len: np.ndarray  # int32 [segments]
    block_table: np.ndarray  # int32 [segments, blocks of max_kv keys]
    embed_mask: np.ndarray  # bool [rows]
    scatter_src: np.ndarray  # int64 [scatter]
    scatter_tokens: np.ndarray  # int64 [scatter]
    scatter_slots: np.ndarray  # int64 [scatter], -1: padding
    scatter_positions: np.ndarray  # int32 [3, scatter]

    @classmethod
    def empty(cls, shape: Shape, block_size: int) -> PaddedStep:
        rows, scatter, width = shape.rows, shape.scatter, -(-shape.max_kv // block_size)
        return cls(
            token_ids=np.empty(rows, np.int64),
            slots=np.empty(rows, np.int64),
            embed_offset=np.empty(rows, np.int64),
            record_base=np.empty(rows, np.int64),
            record_tokens=np.empty(rows, np.int64),
            positions=np.empty((3, rows), np.int32),
            cu_q=np.empty(shape.segments + 1, np.int32),
            near_cu=np.empty(shape.near_segments + 1, np.int32),
            kv_len=np.empty(shape.segments, np.int32),
            block_table=np.empty((shape.segments, width), np.int32),
            embed_mask=np.empty(rows, bool),
            scatter_src=np.empty(scatter, np.int64),
            scatter_tokens=np.empty(scatter, np.int64),
            scatter_slots=np.empty(scatter, np.int64),
            scatter_positions=np.empty((3, scatter), np.int32),
        )

    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def pad_step(step: StepBatch, shape: Shape, into: PaddedStep) -> None:
    """Overwrite ``into``: sampled, far and near rows, each padded to the shape; far and near padding is a segment."""
    rows, samples, far = len(step.token_ids), step.num_samples, step.far_rows
    near_start = shape.samples + shape.far
    parts = (
        (0, samples, 0, shape.samples),
        (samples, far, shape.samples, near_start),
        (far, rows, near_start, shape.rows),
    )
    for target, source, padding in (
        (into.token_ids, step.token_ids, 0),
        (into.slots, step.slots, -1),
        (into.record_base, step.record_base, -1),
        (into.record_tokens, step.record_tokens, 0),
        (into.positions, step.positions, 0),
    ):
        for first, last, start, stop in parts:
            end = start + last - first
            target[..., start:end] = source[..., first:last]
            target[..., end:stop] = padding
    into.embed_offset[:] = 0
    into.embed_mask[:] = False
    if len(step.embed_rows):
        shift = np.array([0, shape.samples - samples, near_start - far])
        where = step.embed_rows + shift[np.searchsorted((samples, far), step.embed_rows, side="right")]
        into.embed_offset[where] = step.embed_offset
        into.embed_mask[where] = True

    into.block_table[:] = 0
    width = min(step.block_table.shape[1], into.block_table.shape[1])
    into.cu_q[: shape.samples] = np.arange(shape.samples)
    into.kv_len[: shape.samples] = 1
    into.kv_len[:samples] = step.kv_len[:samples]
    into.block_table[:samples, :width] = step.block_table[:samples, :width]
    near_segment = shape.samples + shape.far_segments
    for first, last, start, stop, shift_by, end in (
        (samples, step.far_segs, shape.samples, near_segment, shape.samples - samples, near_start),
        (step.far_segs, len(step.kv_len), near_segment, shape.segments, near_start - far, shape.rows),
    ):
        used = start + last - first
        into.cu_q[start:used] = step.cu_q[first:last] + shift_by
        into.kv_len[start:used], into.kv_len[used:stop] = step.kv_len[first:last], 0
        into.block_table[start:used, :width] = step.block_table[first:last, :width]
        if used < stop:  # the padding's segment, and empty ones
            into.cu_q[used], into.cu_q[used + 1 : stop] = step.cu_q[last] + shift_by, end
            into.kv_len[used] = end - into.cu_q[used]
    into.cu_q[-1] = shape.rows
    into.near_cu[:] = into.cu_q[near_segment:] - near_start

    reused = len(step.scatter_src)
    into.scatter_src[:reused], into.scatter_src[reused:] = step.scatter_src, 0
    into.scatter_tokens[:reused], into.scatter_tokens[reused:] = step.scatter_tokens, 0
    into.scatter_slots[:reused], into.scatter_slots[reused:] = step.scatter_slots, -1
    into.scatter_positions[:, :reused], into.scatter_positions[:, reused:] = step.scatter_positions, 0


def fill_padding(shape: Shape, into: PaddedStep) -> None:
    """Overwrite ``into`` with padding alone: rows that compute something finite and write nothing."""
    for array in into.arrays():
        array[...] = 0
    for array in (into.slots, into.record_base, into.scatter_slots):
        array[...] = -1
    near_start, near_segment = shape.samples + shape.far, shape.samples + shape.far_segments
    into.cu_q[: shape.samples] = np.arange(shape.samples)
    into.cu_q[shape.samples : near_segment + 1] = np.linspace(shape.samples, near_start, shape.far_segments + 1)
    into.cu_q[near_segment:] = np.linspace(near_start, shape.rows, shape.near_segments + 1)
    into.near_cu[:] = into.cu_q[near_segment:] - near_start
    into.kv_len[:] = np.diff(into.cu_q)


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
        max_q=(*(shape.far_max_q,) * (layers - 1), 1),
        max_kv=shape.max_kv,
        far_rows=shape.samples + shape.far,
        far_segs=shape.samples + shape.far_segments,
        far_max_q=shape.far_max_q,
        near_cu=step["near_cu"],
        near_max_q=shape.near_max_q,
        near_max_kv=shape.near_max_kv,
        num_samples=shape.samples,
        any_record=shape.recording,
        settled=shape.samples == shape.rows and not shape.scatter,
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
    """Graphs of one model over one set of pages and one arena. One thread owns it."""

    def __init__(self, model: LanguageModel, pages: torch.Tensor, arena: torch.Tensor) -> None:
        self._model = model
        self._pages = pages
        self._arena = arena
        self._policy: GraphPolicy[Shape] = GraphPolicy(partial(pays, launched_by(model)), cost, MAX_GRAPHS)
        self._graphs: dict[Shape, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: StepBatch) -> Replayed | None:
        """The whole step, scattering included; None, and nothing is done, if it must be launched kernel by kernel."""
        least = shape_for(step)
        shape = None if least is None else self._policy.use(least)
        if shape is None:
            return None
        graph = self._graphs[shape]
        graph.inputs.wait()
        pad_step(step, shape, PaddedStep(*graph.inputs.arrays))
        graph.inputs.send()
        graph.graph.replay()
        return Replayed(graph.logits[: step.num_samples], graph.likeliest[: step.num_samples])

    def plan(self, shapes: Iterable[Shape]) -> None:
        """Capture these too, when ``capture_next`` comes to them."""
        self._policy.plan(shapes)

    def capture_next(self) -> bool:
        """Capture one graph; False if none is wanted. Runs padding through the model once, for the sake of lazy
        initialization: that writes nothing to pages and arena."""
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
            log.warning("no memory for the graph of %s, such steps are launched kernel by kernel: %s", shape, error)
            self._policy.give_up(shape)
        else:
            self._policy.captured(shape, time.perf_counter() - started)
        return True

    def report(self) -> GraphReport:
        return self._policy.report()

    def _make(self, shape: Shape) -> _Graph:
        inputs = padding(shape, self._pages)
        graph, (logits, likeliest) = captured(lambda: self._forward(inputs, shape), self._pool)
        return _Graph(inputs, graph, logits, likeliest)

    def _forward(self, inputs: FixedInputs, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        logits = padded_logits(self._model, inputs.tensors, shape, self._pages, self._arena)
        return logits, logits.argmax(-1)


def padding(shape: Shape, pages: torch.Tensor) -> FixedInputs:
    """Inputs of a graph over ``pages``, on the device, that hold padding alone."""
    inputs = FixedInputs(PaddedStep.empty(shape, pages.shape[3]).arrays(), pages.device)
    fill_padding(shape, PaddedStep(*inputs.arrays))
    inputs.send()
    return inputs


def launched_by(model: LanguageModel) -> int:
    """Rows that take as long as launching one of the model's layers."""
    layer = model.layers[0]
    return launched_rows(sum(weight.numel() for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)))


def pays(launched: int, graph: Shape, step: Shape) -> bool:
    """True if such a step is to be replayed from ``graph`` rather than launched."""
    return holds(graph, step) and worthwhile(graph, step, launched)
