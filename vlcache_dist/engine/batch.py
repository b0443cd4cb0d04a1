"""From what each sequence wants computed to the rows and segments of one forward pass. Pure: numpy in, numpy out.

See ``model.batch`` for the meaning of rows, depth and segments. Tokens are handled in runs of equal depth, never one by
one: a warm prompt of 16,384 reused tokens costs a few slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

FAR = 4  #: a segment that sees at least 1 / FAR of the most keys is attended with those that see most
ALL_LAYERS = 1 << 30  #: depth of a run that is computed in every layer, however many the model has

Run = tuple[int, int, int]  #: positions [start, stop) of equal depth


@dataclass(slots=True)
class SpanWork:
    """A span as batches need it. Offsets are arena elements.

    ``depths``: int [length], layers in which each token's K and V are recomputed; None for a fresh span (all).
    ``kv_base``: the KV extent to reuse (required with ``depths``). ``embed_base``: the encoder output (required
    where any token is computed). ``record_base``: where a fresh span's KV is recorded, None if it is not.
    ``in_place``: what ``depths`` does not recompute lies in the pages already, and no extent is read.
    """

    start: int
    length: int
    depths: np.ndarray | None = None
    kv_base: int | None = None
    embed_base: int | None = None
    record_base: int | None = None
    in_place: bool = False
    runs: tuple[Run, ...] = field(init=False)  #: of the whole span, in order

    def __post_init__(self) -> None:
        if self.depths is None:
            self.runs = ((self.start, self.end, ALL_LAYERS),)
            return
        edges = (np.flatnonzero(self.depths[1:] != self.depths[:-1]) + 1).tolist()
        bounds = [0, *edges, self.length]
        self.runs = tuple((self.start + a, self.start + b, int(self.depths[a])) for a, b in pairwise(bounds))

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(slots=True)
class ChunkWork:
    """Positions [start, end) of one sequence; ``sample``: logits of position end - 1 are wanted.

    ``token_ids`` int [>= end], ``positions`` int32 [3, >= end] and ``block_table`` int [blocks] cover the sequence
    from position 0; so does ``slots`` int64 [>= end], the page slot of each position, which a caller that makes many
    chunks of one sequence computes once (None: from the block table). ``spans`` lists at least the spans that
    overlap [start, end), in order.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    block_table: np.ndarray
    start: int
    end: int
    sample: bool
    spans: Sequence[SpanWork] = field(default_factory=tuple)
    slots: np.ndarray | None = None


@dataclass(slots=True)
class StepBatch:
    """The numpy twin of ``model.batch.ForwardBatch`` and ``ScatterBatch`` (``scatter_*``)."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    embed_rows: np.ndarray
    embed_offset: np.ndarray
    record_base: np.ndarray
    record_tokens: np.ndarray
    cu_q: np.ndarray
    kv_len: np.ndarray
    block_table: np.ndarray
    rows_kv: tuple[int, ...]
    rows_q: tuple[int, ...]
    segs_q: tuple[int, ...]
    max_q: tuple[int, ...]
    max_kv: int
    num_samples: int
    far_rows: int
    far_segs: int
    row_chunk: np.ndarray  # int32 [R]: which chunk a row belongs to (for accounting)
    row_position: np.ndarray  # int32 [R]: its position in that sequence
    row_depth: np.ndarray  # int32 [R]
    scatter_src: np.ndarray
    scatter_tokens: np.ndarray
    scatter_slots: np.ndarray
    scatter_positions: np.ndarray


def chunk_runs(chunk: ChunkWork, num_layers: int) -> list[Run]:
    """The chunk as runs of equal depth that tile [start, end); depth 0 where nothing is computed, ``num_layers + 1``
    for the sampled position, which is a run of its own."""
    runs: list[Run] = []
    for start, stop, depth in _pieces(chunk, num_layers):
        if runs and runs[-1][2] == depth:
            runs[-1] = (runs[-1][0], stop, depth)
        else:
            runs.append((start, stop, depth))
    if chunk.sample:
        start, stop, depth = runs.pop()
        if start < stop - 1:
            runs.append((start, stop - 1, depth))
        runs.append((stop - 1, stop, num_layers + 1))
    return runs


def block_slots(block_table: np.ndarray, block_size: int) -> np.ndarray:
    """int64 [blocks * block_size]: the page slot of every position of a sequence."""
    first = np.asarray(block_table, np.int64)[:, None] * block_size
    return (first + np.arange(block_size)).reshape(-1)


def build_step(chunks: Sequence[ChunkWork], *, num_layers: int, block_size: int, kv_row: int, hidden: int) -> StepBatch:
    """Lay the chunks of one step out as rows sorted by depth.

    ``kv_row`` and ``hidden`` are the element counts of ``KVLayout``. Raises ValueError for a reused span without
    extent, or a computed vision token without embedding: the scheduler must not have scheduled those.
    """
    chunk_slots = [block_slots(c.block_table, block_size) if c.slots is None else c.slots for c in chunks]
    deepest = [
        (depth, c, start, stop)
        for c, chunk in enumerate(chunks)
        for start, stop, depth in chunk_runs(chunk, num_layers)
        if depth > 0
    ]
    most = max((stop for *_, stop in deepest), default=0)
    runs = sorted((-depth, depth <= num_layers and stop * FAR < most, c, a, stop) for depth, c, a, stop in deepest)
    far_segs = sum(-depth >= num_layers and not near for depth, near, *_ in runs) or len(runs)
    table = np.array(runs, np.int32).reshape(-1, 5)
    depths, starts, stops = -table[:, 0], table[:, 3], table[:, 4]
    lengths = stops - starts
    cu_q = np.zeros(len(runs) + 1, np.int32)
    np.cumsum(lengths, out=cu_q[1:])
    num_rows = int(cu_q[-1])

    token_ids = np.empty(num_rows, np.int64)
    positions = np.empty((3, num_rows), np.int32)
    slots = np.empty(num_rows, np.int64)
    record_base = np.full(num_rows, -1, np.int64)
    record_tokens = np.zeros(num_rows, np.int64)
    tables = np.zeros((len(runs), max((len(chunk.block_table) for chunk in chunks), default=1)), np.int32)
    embed_rows: list[np.ndarray] = []
    embed_offset: list[np.ndarray] = []

    row = 0
    for segment, (_, _, c, a, b) in enumerate(runs):
        chunk, end = chunks[c], row + b - a
        token_ids[row:end] = chunk.token_ids[a:b]
        positions[:, row:end] = chunk.positions[:, a:b]
        slots[row:end] = chunk_slots[c][a:b]
        tables[segment, : len(chunk.block_table)] = chunk.block_table
        for span in chunk.spans:
            x, y = max(span.start, a), min(span.end, b)
            if x >= y:
                continue
            if span.embed_base is None:
                raise ValueError(f"vision tokens [{x}, {y}) are to be computed but have no encoder output")
            embed_rows.append(np.arange(row + x - a, row + y - a))
            embed_offset.append(_every(span.embed_base, x - span.start, y - span.start, hidden))
            if span.record_base is not None:
                here = slice(row + x - a, row + y - a)
                record_base[here] = _every(span.record_base, x - span.start, y - span.start, kv_row)
                record_tokens[here] = span.length
        row = end

    # Rows and segments of depth > l, for every layer l: both are sorted by depth, deepest first.
    deeper = len(runs) - depths[::-1].searchsorted(np.arange(num_layers + 1), side="right")
    rows_deeper, segs_deeper = cu_q[deeper], deeper[1:]
    longest = np.concatenate(([0], np.maximum.accumulate(lengths)))
    src, tokens, scatter_slots, scatter_positions = _scatter(chunks, chunk_slots, num_layers, kv_row)
    return StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        embed_rows=_joined(embed_rows),
        embed_offset=_joined(embed_offset),
        record_base=record_base,
        record_tokens=record_tokens,
        cu_q=cu_q,
        kv_len=stops,
        block_table=tables,
        rows_kv=tuple(rows_deeper[:-1].tolist()),
        rows_q=tuple(rows_deeper[1:].tolist()),
        segs_q=tuple(segs_deeper.tolist()),
        max_q=tuple(longest[segs_deeper].tolist()),
        max_kv=int(stops.max()) if len(stops) else 0,
        num_samples=sum(chunk.sample for chunk in chunks),
        far_rows=int(cu_q[far_segs]),
        far_segs=far_segs,
        row_chunk=table[:, 2].repeat(lengths),
        row_position=np.arange(num_rows, dtype=np.int32) + np.repeat(starts - cu_q[:-1], lengths),
        row_depth=depths.repeat(lengths),
        scatter_src=src,
        scatter_tokens=tokens,
        scatter_slots=scatter_slots,
        scatter_positions=scatter_positions,
    )


def _pieces(chunk: ChunkWork, num_layers: int) -> Iterator[Run]:
    """Text and span runs of a chunk, in order, cut to it."""
    cursor = chunk.start
    for span in chunk.spans:
        if span.end <= cursor or span.start >= chunk.end:
            continue
        if cursor < span.start:
            yield cursor, span.start, num_layers
            cursor = span.start
        for _, stop, depth in span.runs:
            stop = min(stop, chunk.end)
            if cursor < stop:
                yield cursor, stop, min(depth, num_layers)
                cursor = stop
    if cursor < chunk.end:
        yield cursor, chunk.end, num_layers


def _scatter(
    chunks: Sequence[ChunkWork], chunk_slots: Sequence[np.ndarray], num_layers: int, kv_row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reused tokens of the step whose pages the pass does not fill in every layer by itself."""
    src, tokens, slots, positions = [], [], [], []
    for chunk, own_slots in zip(chunks, chunk_slots, strict=True):
        for span in chunk.spans:
            if span.depths is None or span.in_place:
                continue
            if span.kv_base is None:
                raise ValueError(f"span at {span.start} is to be reused but has no KV extent")
            for start, stop, depth in span.runs:
                a, b = max(start, chunk.start), min(stop, chunk.end)
                if a < b and depth < num_layers:
                    src.append(_every(span.kv_base, a - span.start, b - span.start, kv_row))
                    tokens.append(np.full(b - a, span.length))
                    slots.append(own_slots[a:b])
                    positions.append(chunk.positions[:, a:b])
    if not src:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty((3, 0), np.int32)
    placed = positions[0] if len(positions) == 1 else np.concatenate(positions, axis=1)
    return _joined(src), _joined(tokens), _joined(slots), placed.astype(np.int32, copy=False)


def _every(base: int, start: int, stop: int, stride: int) -> np.ndarray:
    """int64: base + i * stride for i in [start, stop)."""
    return np.arange(base + start * stride, base + stop * stride, stride)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
