"""Rows and segments of a step, against their definition token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_dist.engine.batch import FAR, ChunkWork, SpanWork, build_step, chunk_runs

LAYERS, BLOCK, KV_ROW, HIDDEN = 4, 4, 6, 10


@st.composite
def chunks(draw: st.DrawFn) -> ChunkWork:
    total = draw(st.integers(1, 40))
    start = draw(st.integers(0, total - 1))
    end = draw(st.integers(start + 1, total))
    sample = draw(st.booleans())
    spans, cursor = [], draw(st.integers(0, 6))
    while cursor + 2 < total and len(spans) < 4:
        length = draw(st.integers(1, min(12, total - cursor - 1)))
        depths = None
        if draw(st.booleans()):
            depths = np.array(draw(st.lists(st.integers(0, LAYERS), min_size=length, max_size=length)), np.int32)
        spans.append(
            SpanWork(
                cursor,
                length,
                depths,
                kv_base=1000 * len(spans),
                embed_base=500 * len(spans),
                record_base=draw(st.sampled_from([None, 7000])) if depths is None else None,
            )
        )
        cursor += length + draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return ChunkWork(
        token_ids=rng.integers(0, 99, total),
        positions=rng.integers(0, 99, (3, total)).astype(np.int32),
        block_table=rng.permutation(50)[: -(-total // BLOCK)].astype(np.int32),
        start=start,
        end=end,
        sample=sample,
        spans=spans,
    )


def depth_of(chunk: ChunkWork, position: int) -> int:
    if chunk.sample and position == chunk.end - 1:
        return LAYERS + 1
    for span in chunk.spans:
        if span.start <= position < span.end:
            return LAYERS if span.depths is None else int(span.depths[position - span.start])
    return LAYERS


@settings(max_examples=150, deadline=None)
@given(st.lists(chunks(), min_size=1, max_size=4))
def test_rows_and_segments(work: list[ChunkWork]) -> None:
    step = build_step(work, num_layers=LAYERS, block_size=BLOCK, kv_row=KV_ROW, hidden=HIDDEN)
    expected = {(c, p): depth_of(chunk, p) for c, chunk in enumerate(work) for p in range(chunk.start, chunk.end)}
    rows = list(zip(step.row_chunk.tolist(), step.row_position.tolist(), step.row_depth.tolist(), strict=True))
    assert len(rows) == len(set(rows))
    assert {(c, p): depth for c, p, depth in rows} == {key: depth for key, depth in expected.items() if depth}
    assert np.all(np.diff(step.row_depth) <= 0)
    embeds = dict(zip(step.embed_rows.tolist(), step.embed_offset.tolist(), strict=True))
    for row, (c, p, _) in enumerate(rows):
        chunk = work[c]
        slot = chunk.block_table[p // BLOCK] * BLOCK + p % BLOCK
        assert step.token_ids[row] == chunk.token_ids[p]
        assert step.slots[row] == slot
        assert np.array_equal(step.positions[:, row], chunk.positions[:, p])
        span = next((s for s in chunk.spans if s.start <= p < s.end), None)
        assert (row in embeds) == (span is not None)
        if span is not None:
            token = p - span.start
            assert embeds[row] == span.embed_base + token * HIDDEN
            recorded = span.record_base is not None
            assert step.record_base[row] == (span.record_base + token * KV_ROW if recorded else -1)
            assert step.record_tokens[row] == (span.length if recorded else 0)
        else:
            assert step.record_base[row] == -1
    for layer in range(LAYERS):
        assert step.rows_kv[layer] == sum(depth > layer for depth in expected.values())
        assert step.rows_q[layer] == sum(depth > layer + 1 for depth in expected.values())
        assert step.cu_q[step.segs_q[layer]] == step.rows_q[layer]
        lengths = np.diff(step.cu_q)[: step.segs_q[layer]]
        assert step.max_q[layer] == (lengths.max() if len(lengths) else 0)
    for s, (a, b) in enumerate(zip(step.cu_q[:-1], step.cu_q[1:], strict=True)):
        assert len(set(step.row_depth[a:b])) == 1
        assert len(set(step.row_chunk[a:b])) == 1
        assert step.kv_len[s] == step.row_position[b - 1] + 1
        assert np.array_equal(step.row_position[a:b], np.arange(step.kv_len[s] - (b - a), step.kv_len[s]))
        table = work[step.row_chunk[a]].block_table
        assert np.array_equal(step.block_table[s, : len(table)], table)
    assert step.num_samples == sum(chunk.sample for chunk in work)
    sampled = [c for c, chunk in enumerate(work) if chunk.sample]
    assert step.row_chunk[: step.num_samples].tolist() == sampled
    assert step.max_kv == max(step.kv_len.tolist(), default=0)
    segments = len(step.kv_len)
    assert step.cu_q[step.far_segs] == step.far_rows and (step.far_segs > 0 or segments == 0)
    if step.far_segs < segments:
        assert step.num_samples <= step.far_rows
        sees_far = (step.kv_len * FAR >= step.max_kv) & (step.row_depth[step.cu_q[:-1]] == LAYERS)
        assert np.flatnonzero(sees_far).tolist() == list(range(step.num_samples, step.far_segs))


@settings(max_examples=150, deadline=None)
@given(st.lists(chunks(), min_size=1, max_size=4))
def test_what_is_copied(work: list[ChunkWork]) -> None:
    step = build_step(work, num_layers=LAYERS, block_size=BLOCK, kv_row=KV_ROW, hidden=HIDDEN)
    expected = []
    for chunk in work:
        for span in chunk.spans:
            for p in range(max(span.start, chunk.start), min(span.end, chunk.end)):
                if span.depths is not None and span.depths[p - span.start] < LAYERS:
                    slot = chunk.block_table[p // BLOCK] * BLOCK + p % BLOCK
                    source = span.kv_base + (p - span.start) * KV_ROW
                    expected.append((source, span.length, slot, *chunk.positions[:, p]))
    got = zip(step.scatter_src, step.scatter_tokens, step.scatter_slots, *step.scatter_positions, strict=True)
    assert [tuple(map(int, row)) for row in got] == [tuple(map(int, row)) for row in expected]


def chunk_with(span: SpanWork) -> ChunkWork:
    return ChunkWork(np.zeros(9), np.zeros((3, 9), np.int32), np.arange(3), 0, 9, True, [span])


def test_text_and_fresh_pictures_are_one_segment() -> None:
    assert chunk_runs(chunk_with(SpanWork(2, 4, embed_base=0)), LAYERS) == [(0, 8, LAYERS), (8, 9, LAYERS + 1)]


def test_missing_extents_are_named() -> None:
    options = {"num_layers": LAYERS, "block_size": BLOCK, "kv_row": KV_ROW, "hidden": HIDDEN}
    with pytest.raises(ValueError, match=r"\[2, 6\).*encoder output"):
        build_step([chunk_with(SpanWork(2, 4))], **options)
    with pytest.raises(ValueError, match=r"span at 2 .*no KV extent"):
        build_step([chunk_with(SpanWork(2, 4, np.zeros(4, np.int32)))], **options)


def test_precomputed_slots_are_used() -> None:
    chunk = chunk_with(SpanWork(2, 4, np.zeros(4, np.int32), kv_base=0))
    chunk.slots = np.arange(100, 109)
    step = build_step([chunk], num_layers=LAYERS, block_size=BLOCK, kv_row=KV_ROW, hidden=HIDDEN)
    assert step.scatter_slots.tolist() == [102, 103, 104, 105]
    assert sorted(step.slots.tolist()) == [100, 101, 106, 107, 108]
