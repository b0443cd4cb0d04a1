"""Steps padded to a graph's shape compute what unpadded ones do; on a GPU, graphs do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_dist import kernels
from vlcache_dist.bench.shapes import random_models
from vlcache_dist.engine.batch import ChunkWork, SpanWork, StepBatch, build_step
from vlcache_dist.engine.graph_shapes import (
    ROWS,
    SAMPLES,
    Shape,
    cost,
    decode_shapes,
    eager_shapes,
    holds,
    launched_rows,
    prefill_shapes,
    shape_for,
    worthwhile,
)
from vlcache_dist.engine.graphs import GraphedForward, PaddedStep, fill_padding, pad_step, padded_input, padded_logits
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.upload import FixedInputs
from vlcache_dist.model.weights import BUNDLED, Checkpoint

BLOCK, BLOCKS = 16, 64
CONFIG: ModelConfig = Checkpoint.open(BUNDLED).config
TEXT = CONFIG.text
KV_TOKEN = TEXT.num_layers * 2 * TEXT.num_kv_heads * TEXT.head_dim
RECORDS = 1 << 17  # where records begin in the arena


def chunk(rng: np.random.Generator, table: np.ndarray, start: int, end: int, span: SpanWork | None) -> ChunkWork:
    tokens = rng.integers(1, 800, end)
    positions = np.tile(np.arange(end, dtype=np.int32), (3, 1))
    return ChunkWork(tokens, positions, table, start, end, True, (span,) if span else ())


def step_of(rng: np.random.Generator, pieces: list[tuple[int, int, int]]) -> StepBatch:
    """(start, rows, kind) per sequence; a reused picture of 24 tokens has its first 4 recomputed, a fresh one is
    recorded."""
    chunks, next_block = [], 1
    for number, (start, rows, kind) in enumerate(pieces):
        span, end = None, start + rows
        if kind == REUSED:
            depths = np.zeros(24, np.int32)
            depths[:4] = TEXT.num_layers
            span = SpanWork(start + 1, 24, depths, kv_base=0, embed_base=4096)
        elif kind == FRESH:
            span = SpanWork(start + 1, 24, embed_base=4096, record_base=RECORDS + number * KV_TOKEN * 24)
        if span is not None:
            end = start + 1 + 24 + rows
        needed = -(-end // BLOCK)
        chunks.append(chunk(rng, np.arange(next_block, next_block + needed), start, end, span))
        next_block += needed
    row = TEXT.num_kv_heads * TEXT.head_dim
    return build_step(chunks, num_layers=TEXT.num_layers, block_size=BLOCK, kv_row=row, hidden=TEXT.hidden_size)


def memory(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (TEXT.num_layers, 2, BLOCKS, BLOCK, TEXT.num_kv_heads, TEXT.head_dim)
    generator = torch.Generator(device).manual_seed(1)
    pages = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return pages, torch.randn(RECORDS + 4 * KV_TOKEN * 24, generator=generator, device=device, dtype=dtype)


TEXT_ONLY, REUSED, FRESH = 0, 1, 2
PIECES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 40), st.sampled_from((TEXT_ONLY, REUSED, FRESH))),
    min_size=1,
    max_size=4,
)


def fixed(step: StepBatch, shape: Shape) -> list[torch.Tensor]:
    """The step in the shape's inputs, where another step left its traces."""
    inputs = FixedInputs(PaddedStep.empty(shape, BLOCK).arrays(), torch.device("cpu"))
    for array in inputs.arrays:
        array[...] = 1
    pad_step(step, shape, PaddedStep(*inputs.arrays))
    inputs.send()
    return inputs.tensors


@settings(max_examples=25, deadline=None)
@given(PIECES)
def test_padding_changes_nothing(pieces: list[tuple[int, int, int]]) -> None:
    language, _ = random_models(CONFIG, torch.device("cpu"), torch.float32)
    step = step_of(np.random.default_rng(0), pieces)
    shape = shape_for(step)
    assert shape is not None and shape.rows in ROWS and shape.rows >= len(step.token_ids)
    plain, arena = memory("cpu", torch.float32)
    padded = plain.clone()
    recorded = arena.clone()
    scatter = ScatterBatch.from_step(step, "cpu")
    assert (scatter is not None) == (shape.scatter > 0) and shape.recording == any(kind == 2 for *_, kind in pieces)
    expected = language.forward(ForwardBatch.from_step(step, "cpu"), plain, arena, scatter)
    logits = padded_logits(language, fixed(step, shape), shape, padded, recorded)[: step.num_samples]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorded, arena, rtol=1e-5, atol=1e-5)


def test_decode_is_one_query_per_sequence() -> None:
    shape = shape_for(step_of(np.random.default_rng(0), [(30, 1, TEXT_ONLY), (7, 1, TEXT_ONLY), (100, 1, TEXT_ONLY)]))
    assert shape is not None and (shape.rows, shape.samples, shape.segments, shape.far_max_q) == (4, 4, 4, 1)


def test_what_does_not_qualify() -> None:
    rng = np.random.default_rng(0)
    assert shape_for(step_of(rng, [(0, 2049, TEXT_ONLY)])) is None, "too many rows"
    pyramid = step_of(rng, [(0, 8, REUSED)])
    shrinking = ChunkWork(
        np.ones(40, np.int64),
        np.zeros((3, 40), np.int32),
        np.arange(1, 4),
        0,
        40,
        True,
        (SpanWork(4, 24, np.r_[np.full(4, 2), np.zeros(20)].astype(np.int32), kv_base=0, embed_base=0),),
    )
    row = TEXT.num_kv_heads * TEXT.head_dim
    step = build_step([shrinking], num_layers=TEXT.num_layers, block_size=BLOCK, kv_row=row, hidden=TEXT.hidden_size)
    assert shape_for(pyramid) is not None and shape_for(step) is None, "rows shrink from layer to layer"
    shrinking.spans = (
        SpanWork(4, 24, np.r_[np.full(4, TEXT.num_layers - 1), np.zeros(20)].astype(np.int32), kv_base=0, embed_base=0),
    )
    step = build_step([shrinking], num_layers=TEXT.num_layers, block_size=BLOCK, kv_row=row, hidden=TEXT.hidden_size)
    assert step.rows_kv[-2] == len(step.token_ids) and shape_for(step) is None, "in the last layer only"


@pytest.mark.parametrize(
    ("pieces", "settled"),
    [
        ([(30, 1, TEXT_ONLY), (7, 1, TEXT_ONLY)], True),
        ([(30, 2, TEXT_ONLY)], False),
        ([(30, 1, TEXT_ONLY), (3, 1, REUSED)], False),
        ([(30, 1, TEXT_ONLY), (0, 1, FRESH)], False),
    ],
)
def test_keys_are_settled_where_every_sequence_has_one_row(pieces, settled, monkeypatch) -> None:
    """Attention may ask for keys early only if this pass writes none of them but each row's own."""
    language, _ = random_models(CONFIG, torch.device("cpu"), torch.float32)
    step = step_of(np.random.default_rng(0), pieces)
    pages, arena = memory("cpu", torch.float32)
    told: list[bool] = []
    attend = kernels.segment_attention
    monkeypatch.setattr(kernels, "segment_attention", lambda *args: told.append(args[10:] == (True,)) or attend(*args))
    language.forward(ForwardBatch.from_step(step, "cpu"), pages, arena, ScatterBatch.from_step(step, "cpu"))
    shape = shape_for(step)
    assert shape is not None
    padded_logits(language, fixed(step, shape), shape, pages, arena)
    assert len(told) >= 2 * (TEXT.num_layers - 1) and set(told) == {settled}


def test_a_sampled_row_of_a_scattered_prompt_is_not_settled() -> None:
    """Its keys are scattered in the same pass, although every sequence has one row."""
    span = SpanWork(0, 24, np.zeros(24, np.int32), kv_base=0)
    work = ChunkWork(np.ones(25, np.int64), np.zeros((3, 25), np.int32), np.arange(1, 3), 0, 25, True, (span,))
    row = TEXT.num_kv_heads * TEXT.head_dim
    step = build_step([work], num_layers=TEXT.num_layers, block_size=BLOCK, kv_row=row, hidden=TEXT.hidden_size)
    assert step.num_samples == len(step.token_ids) == 1 and len(step.scatter_src) == 24
    assert not ForwardBatch.from_step(step, "cpu").settled
    shape, language = shape_for(step), random_models(CONFIG, torch.device("cpu"), torch.float32)[0]
    assert shape is not None
    _, batch, _ = padded_input(language, fixed(step, shape), shape, memory("cpu", torch.float32)[1])
    assert not batch.settled


def test_padding_alone_writes_nothing_and_is_finite() -> None:
    language, _ = random_models(CONFIG, torch.device("cpu"), torch.float32)
    for pieces in ([(0, 30, TEXT_ONLY)], [(3, 20, REUSED), (9, 1, TEXT_ONLY)], [(0, 25, FRESH), (2, 40, TEXT_ONLY)]):
        shape = shape_for(step_of(np.random.default_rng(0), pieces))
        assert shape is not None
        pages, arena = memory("cpu", torch.float32)
        before = pages.clone(), arena.clone()
        inputs = FixedInputs(PaddedStep.empty(shape, BLOCK).arrays(), torch.device("cpu"))
        step = PaddedStep(*inputs.arrays)
        for array in inputs.arrays:
            array[...] = 1
        fill_padding(shape, step)
        inputs.send()
        assert step.cu_q[-1] == shape.rows and (np.diff(step.cu_q) >= 0).all()
        assert np.diff(step.cu_q).max() <= max(shape.far_max_q, shape.near_max_q) and step.kv_len.max() <= shape.max_kv
        assert padded_logits(language, inputs.tensors, shape, pages, arena).isfinite().all()
        assert torch.equal(pages, before[0]) and torch.equal(arena, before[1])


AHEAD = prefill_shapes(max_rows=512, max_batch=4, max_keys=512)


@settings(max_examples=10, deadline=None)
@given(PIECES)
def test_a_larger_shape_computes_the_same(pieces: list[tuple[int, int, int]]) -> None:
    """Steps are padded to shapes captured at start, whose far and near rows, segments and bounds are others."""
    language, _ = random_models(CONFIG, torch.device("cpu"), torch.float32)
    step = step_of(np.random.default_rng(0), pieces)
    least = shape_for(step)
    assert least is not None and holds(least, least) == (
        (not least.far or least.far_max_q >= least.far) and (not least.near or least.near_max_q >= least.near)
    )
    able = sorted((shape for shape in AHEAD if holds(shape, least)), key=cost)
    assert able, "what this test draws is held by what is captured at start"
    for shape in (able[0], able[len(able) // 2]):
        plain, arena = memory("cpu", torch.float32)
        padded, recorded = plain.clone(), arena.clone()
        expected = language.forward(
            ForwardBatch.from_step(step, "cpu"), plain, arena, ScatterBatch.from_step(step, "cpu")
        )
        tensors = fixed(step, shape)
        fields = PaddedStep(*(tensor.numpy() for tensor in tensors))
        queries = np.diff(fields.cu_q)
        assert fields.cu_q[-1] == shape.rows and (queries >= 0).all() and (fields.kv_len >= queries).all()
        assert queries[: shape.samples + shape.far_segments].max() <= shape.far_max_q
        assert queries[shape.samples + shape.far_segments :].max(initial=0) <= shape.near_max_q
        logits = padded_logits(language, tensors, shape, padded, recorded)[: step.num_samples]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(recorded, arena, rtol=1e-5, atol=1e-5)


def test_shapes_to_be_captured_ahead_are_few_and_consistent() -> None:
    for max_rows, max_batch, max_keys in ((2048, 64, 128_000), (64, 1, 64), (512, 3, 5000)):
        shapes = [*prefill_shapes(max_rows, max_batch, max_keys), *eager_shapes(max_rows)]
        assert len(shapes) <= 60 and all(shape.rows <= max(max_rows, 2 * 64) + max_batch for shape in shapes)
        assert all(shape.near >= 0 and (shape.near_segments > 0) == (shape.near > 0) for shape in shapes)
        assert all((shape.far_segments > 0) == (shape.far > 0) for shape in shapes)


def test_a_larger_graph_pays_up_to_what_launching_costs() -> None:
    """7B: some 1,100 rows are computed while a step is launched; 32B, with its larger layers: half as many."""
    seven, thirty_two = launched_rows(233_057_280), launched_rows(487_587_840)
    assert 1000 < seven < 1200 and 450 < thirty_two < 600
    few, many = (prefill_shapes(2048, 1, 4096)[i] for i in (0, -1))
    assert few.rows == 128 and many.rows == 1024
    assert worthwhile(many, few, seven) and not worthwhile(many, few, thirty_two)
    assert worthwhile(many, replace(few, rows=700), thirty_two), "a step of its own kind of size"


@pytest.mark.parametrize("lengths", [(30,), (30, 100, 7), (3000, 1), (10,) * 9])
def test_decode_steps_find_the_shapes_prepared_for_them(lengths: tuple[int, ...]) -> None:
    tokens, rope = np.ones(4096, np.int64), np.zeros((3, 4096), np.int32)
    table = np.arange(256)
    chunks = [ChunkWork(tokens, rope, table, n - 1, n, True) for n in lengths]
    step = build_step(chunks, num_layers=TEXT.num_layers, block_size=BLOCK, kv_row=8, hidden=8)
    prepared = decode_shapes(max_batch=12, max_keys=4000)
    assert len(prepared) == 2 * SAMPLES.index(16) + 2 == len(set(prepared))
    shape = shape_for(step)
    assert shape in prepared and shape.max_kv >= max(lengths) and shape.rows >= len(lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graphs_replay_what_is_launched() -> None:
    language, _ = random_models(CONFIG, torch.device("cuda"), torch.bfloat16)
    plain, arena = memory("cuda", torch.bfloat16)
    replayed = plain.clone()
    rng = np.random.default_rng(0)
    recorded = arena.clone()
    for pieces in ([(0, 30, TEXT_ONLY)], [(3, 20, REUSED), (9, 1, TEXT_ONLY)], [(0, 25, FRESH)], [(30, 1, TEXT_ONLY)]):
        step = step_of(rng, pieces)
        scatter = ScatterBatch.from_step(step, "cuda")
        expected = language.forward(ForwardBatch.from_step(step, "cuda"), plain, arena, scatter)
        graphs = GraphedForward(language, replayed, recorded)
        for _ in range(4):
            assert graphs.run(step) is None, "nothing is captured while somebody waits"
        assert graphs.capture_next()
        for _ in range(2):
            done = graphs.run(step)
            assert done is not None
            torch.testing.assert_close(done.logits, expected, rtol=2e-2, atol=2e-2)
            assert done.likeliest.tolist() == done.logits.argmax(-1).tolist()
            torch.testing.assert_close(replayed, plain, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(recorded, arena, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_idle_engine_captures_what_was_used() -> None:
    language, _ = random_models(CONFIG, torch.device("cuda"), torch.bfloat16)
    pages, arena = memory("cuda", torch.bfloat16)
    graphs = GraphedForward(language, pages, arena)
    step = step_of(np.random.default_rng(0), [(3, 20, REUSED)])
    before = pages.clone()
    assert not graphs.capture_next() and graphs.run(step) is None
    assert not graphs.capture_next() and graphs.run(step) is None, "what came once may not come again"
    assert graphs.capture_next() and not graphs.capture_next()
    assert torch.equal(pages, before), "capturing runs on padding"
    assert graphs.run(step) is not None
