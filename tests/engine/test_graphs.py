"""Steps padded to a graph's shape compute what unpadded ones do; on a GPU, graphs do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_dist.bench.shapes import random_models
from vlcache_dist.engine.batch import ChunkWork, SpanWork, StepBatch, build_step
from vlcache_dist.engine.graphs import ROWS, GraphedForward, pad_step, padded_logits, shape_for
from vlcache_dist.model.batch import ForwardBatch
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.weights import BUNDLED, Checkpoint

BLOCK, BLOCKS = 16, 64
CONFIG: ModelConfig = Checkpoint.open(BUNDLED).config
TEXT = CONFIG.text


def chunk(rng: np.random.Generator, table: np.ndarray, start: int, end: int, span: SpanWork | None) -> ChunkWork:
    tokens = rng.integers(1, 800, end)
    positions = np.tile(np.arange(end, dtype=np.int32), (3, 1))
    return ChunkWork(tokens, positions, table, start, end, True, (span,) if span else ())


def step_of(rng: np.random.Generator, pieces: list[tuple[int, int, bool]]) -> StepBatch:
    """(start, rows, with a picture whose first 4 tokens are recomputed) per sequence."""
    chunks, next_block = [], 1
    for start, rows, picture in pieces:
        span, end = None, start + rows
        if picture:
            depths = np.zeros(24, np.int32)
            depths[:4] = TEXT.num_layers
            span = SpanWork(start + 1, 24, depths, kv_base=0, embed_base=4096)
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
    return pages, torch.randn(1 << 17, generator=generator, device=device, dtype=dtype)


PIECES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(PIECES)
def test_padding_changes_nothing(pieces: list[tuple[int, int, bool]]) -> None:
    language, _ = random_models(CONFIG, torch.device("cpu"), torch.float32)
    step = step_of(np.random.default_rng(0), pieces)
    shape = shape_for(step)
    assert shape is not None and shape.rows in ROWS and shape.rows >= len(step.token_ids)
    plain, arena = memory("cpu", torch.float32)
    padded = plain.clone()
    expected = language.forward(ForwardBatch.from_step(step, "cpu"), plain, arena, None)
    tensors = [torch.from_numpy(array) for array in pad_step(step, shape).arrays()]
    logits = padded_logits(language, tensors, shape, padded, arena)[: step.num_samples]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_decode_is_one_query_per_sequence() -> None:
    shape = shape_for(step_of(np.random.default_rng(0), [(30, 1, False), (7, 1, False), (100, 1, False)]))
    assert shape is not None and (shape.rows, shape.samples, shape.segments, shape.max_q) == (4, 4, 4, 1)


def test_what_does_not_qualify() -> None:
    rng = np.random.default_rng(0)
    assert shape_for(step_of(rng, [(0, 1025, False)])) is None, "too many rows"
    pyramid = step_of(rng, [(0, 8, True)])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graphs_replay_what_is_launched() -> None:
    language, _ = random_models(CONFIG, torch.device("cuda"), torch.bfloat16)
    plain, arena = memory("cuda", torch.bfloat16)
    replayed = plain.clone()
    graphs = GraphedForward(language, replayed, arena)
    rng = np.random.default_rng(0)
    for pieces in ([(0, 30, False)], [(3, 20, True), (9, 1, False)], [(0, 25, False)], [(30, 1, False), (7, 1, False)]):
        step = step_of(rng, pieces)
        expected = language.forward(ForwardBatch.from_step(step, "cuda"), plain, arena, None)
        logits = graphs.logits(step)
        assert logits is not None
        torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(replayed, plain, rtol=2e-2, atol=2e-2)
