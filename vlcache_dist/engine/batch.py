"""From what each sequence wants computed to the rows and segments of one forward pass. Pure: numpy in, numpy out.

See ``model.batch`` for the meaning of rows, depth and segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class SpanWork:
    """A span as this pass needs it. Offsets are arena elements.

    ``depths``: int [length], layers in which each token's K and V are recomputed; None for a fresh span (all).
    ``kv_base``: the KV extent to reuse (required with ``depths``). ``embed_base``: the encoder output (required
    where any token is computed). ``record_base``: where a fresh span's KV is recorded, None if it is not.
    """

    start: int
    length: int
    depths: np.ndarray | None = None
    kv_base: int | None = None
    embed_base: int | None = None
    record_base: int | None = None


@dataclass(slots=True)
class ChunkWork:
    """Positions [start, end) of one sequence; ``sample``: logits of position end - 1 are wanted.

    ``token_ids`` int [>= end], ``positions`` int [3, >= end] and ``block_table`` int [blocks] cover the sequence
    from position 0. ``spans`` lists at least the spans that overlap [start, end).
    """

    token_ids: np.ndarray
    positions: np.ndarray
    block_table: np.ndarray
    start: int
    end: int
    sample: bool
    spans: Sequence[SpanWork] = field(default_factory=tuple)


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
    row_chunk: np.ndarray  # int32 [R]: which chunk a row belongs to (for accounting)
    row_position: np.ndarray  # int32 [R]: its position in that sequence
    row_depth: np.ndarray  # int32 [R]
    scatter_src: np.ndarray
    scatter_tokens: np.ndarray
    scatter_slots: np.ndarray
    scatter_positions: np.ndarray


def token_depths(chunk: ChunkWork, num_layers: int) -> np.ndarray:
    """Depth of positions [start, end): int32 [end - start]; 0 where nothing is computed."""
    depth = np.full(chunk.end - chunk.start, num_layers, np.int32)
    for span in chunk.spans:
        if span.depths is None:
            continue
        a, b = max(span.start, chunk.start), min(span.start + span.length, chunk.end)
        if a < b:
            depth[a - chunk.start : b - chunk.start] = span.depths[a - span.start : b - span.start]
    if chunk.sample:
        depth[-1] = num_layers + 1
    return depth


def active_tokens(chunk: ChunkWork, num_layers: int) -> int:
    """Rows the chunk costs in layer 0: what a scheduler's token budget counts."""
    return int((token_depths(chunk, num_layers) > 0).sum())


def build_step(
    chunks: Sequence[ChunkWork], *, num_layers: int, block_size: int, kv_row: int, hidden: int
) -> StepBatch:
    """Lay the chunks of one step out as rows sorted by depth.

    ``kv_row`` and ``hidden`` are the element counts of ``KVLayout``. Raises ValueError for a reused span without
    extent, or a computed vision token without embedding: the scheduler must not have scheduled those.
    """
    runs: list[tuple[int, int, int, int]] = []  # (-depth, chunk, start, end)
    for c, chunk in enumerate(chunks):
        depth = token_depths(chunk, num_layers)
        edges = np.flatnonzero(np.diff(depth)) + 1
        bounds = [0, *edges.tolist(), len(depth)]
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            if depth[a] > 0:
                runs.append((-int(depth[a]), c, chunk.start + a, chunk.start + b))
    runs.sort()

    num_rows = sum(b - a for _, _, a, b in runs)
    width = max((len(chunk.block_table) for chunk in chunks), default=1)
    token_ids = np.empty(num_rows, np.int64)
    positions = np.empty((3, num_rows), np.int32)
    slots = np.empty(num_rows, np.int64)
    row_chunk = np.empty(num_rows, np.int32)
    row_position = np.empty(num_rows, np.int32)
    row_depth = np.empty(num_rows, np.int32)
    record_base = np.full(num_rows, -1, np.int64)
    record_tokens = np.zeros(num_rows, np.int64)
    cu_q = np.zeros(len(runs) + 1, np.int32)
    kv_len = np.empty(len(runs), np.int32)
    tables = np.zeros((len(runs), width), np.int32)
    embed_rows: list[np.ndarray] = []
    embed_offset: list[np.ndarray] = []

    row = 0
    for s, (negative_depth, c, a, b) in enumerate(runs):
        chunk, here = chunks[c], slice(row, row + b - a)
        index = np.arange(a, b)
        token_ids[here] = chunk.token_ids[a:b]
        positions[:, here] = chunk.positions[:, a:b]
        slots[here] = _slots(chunk, index, block_size)
        row_chunk[here], row_position[here], row_depth[here] = c, index, -negative_depth
        cu_q[s + 1], kv_len[s] = row + b - a, b
        tables[s, : len(chunk.block_table)] = chunk.block_table
        for span in chunk.spans:
            x, y = max(span.start, a), min(span.start + span.length, b)
            if x >= y:
                continue
            if span.embed_base is None:
                raise ValueError(f"vision tokens [{x}, {y}) are to be computed but have no encoder output")
            rows = np.arange(row + x - a, row + y - a, dtype=np.int64)
            token = np.arange(x - span.start, y - span.start, dtype=np.int64)
            embed_rows.append(rows)
            embed_offset.append(span.embed_base + token * hidden)
            if span.record_base is not None:
                record_base[rows] = span.record_base + token * kv_row
                record_tokens[rows] = span.length
        row += b - a

    depths = -np.array([r[0] for r in runs], np.int32)
    lengths = np.diff(cu_q)
    rows_kv = tuple(int((row_depth > layer).sum()) for layer in range(num_layers))
    rows_q = tuple(int((row_depth > layer + 1).sum()) for layer in range(num_layers))
    segs_q = tuple(int((depths > layer + 1).sum()) for layer in range(num_layers))
    scatter = _scatter(chunks, num_layers, block_size, kv_row)
    return StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        embed_rows=np.concatenate(embed_rows) if embed_rows else np.empty(0, np.int64),
        embed_offset=np.concatenate(embed_offset) if embed_offset else np.empty(0, np.int64),
        record_base=record_base,
        record_tokens=record_tokens,
        cu_q=cu_q,
        kv_len=kv_len,
        block_table=tables,
        rows_kv=rows_kv,
        rows_q=rows_q,
        segs_q=segs_q,
        max_q=tuple(int(lengths[:n].max()) if n else 0 for n in segs_q),
        max_kv=int(kv_len.max()) if len(kv_len) else 0,
        num_samples=sum(chunk.sample for chunk in chunks),
        row_chunk=row_chunk,
        row_position=row_position,
        row_depth=row_depth,
        scatter_src=scatter[0],
        scatter_tokens=scatter[1],
        scatter_slots=scatter[2],
        scatter_positions=scatter[3],
    )


def _slots(chunk: ChunkWork, index: np.ndarray, block_size: int) -> np.ndarray:
    return chunk.block_table[index // block_size].astype(np.int64) * block_size + index % block_size


def _scatter(
    chunks: Sequence[ChunkWork], num_layers: int, block_size: int, kv_row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reused tokens of the step whose pages the pass does not fill in every layer by itself."""
    src, tokens, slots, positions = [], [], [], []
    for chunk in chunks:
        for span in chunk.spans:
            if span.depths is None:
                continue
            if span.kv_base is None:
                raise ValueError(f"span at {span.start} is to be reused but has no KV extent")
            a, b = max(span.start, chunk.start), min(span.start + span.length, chunk.end)
            index = np.arange(a, b)
            index = index[span.depths[index - span.start] < num_layers]
            src.append(span.kv_base + (index - span.start).astype(np.int64) * kv_row)
            tokens.append(np.full(len(index), span.length, np.int64))
            slots.append(_slots(chunk, index, block_size))
            positions.append(chunk.positions[:, index])
    if not src:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty((3, 0), np.int32)
    return (
        np.concatenate(src),
        np.concatenate(tokens),
        np.concatenate(slots),
        np.concatenate(positions, axis=1).astype(np.int32),
    )
