"""Passes behind arriving KV from CUDA graphs: what a group computes on padded rows is what the whole pass computes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_streaming import generation, with_objects

from vlcache_dist.bench.shapes import model_config, random_models
from vlcache_dist.engine.batch import ChunkWork, SpanWork, build_step
from vlcache_dist.engine.graph_shapes import shape_for
from vlcache_dist.engine.graphs import PaddedStep, pad_step, padded_logits
from vlcache_dist.engine.stream_graphs import GroupedForward, padded_group


def test_groups_of_a_padded_pass_are_the_padded_pass() -> None:
    """On CPU: shapes, padding and the hidden state between groups."""
    site = with_objects()
    site.add(generation(site))
    site.step()
    site.resolve()
    ((_, chunk),) = site.engine._scheduler.schedule()
    layout = site.layout
    step = build_step([chunk], num_layers=layout.num_layers, block_size=4, kv_row=layout.kv_row, hidden=layout.hidden)
    shape = shape_for(step)
    assert shape is not None and shape.rows > len(step.token_ids), "padding must take part"
    padded = PaddedStep.empty(shape, 4)
    pad_step(step, shape, padded)
    tensors = [torch.from_numpy(array) for array in padded.arrays()]
    whole, grouped = site.pages.clone(), site.pages.clone()
    arena = torch.nan_to_num(site.arena.tensor)  # padding rows read anything
    expected = padded_logits(site.model, tensors, shape, whole, arena)
    for edges in [(0, 4), (0, 1, 4), (0, 1, 2, 3, 4)]:
        grouped.zero_()
        x = None
        for start, stop in pairwise(edges):
            x = padded_group(site.model, tensors, shape, grouped, arena, x, start, stop)
        assert x is not None
        assert torch.equal(site.model.logits(x)[: step.num_samples], expected[: step.num_samples])
        assert torch.equal(grouped, whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_replayed_groups_equal_launched_ones() -> None:
    device = torch.device("cuda")
    config = model_config("tiny")
    language, _ = random_models(config, device, torch.bfloat16)
    text = config.text
    shape = (text.num_layers, 2, 64, 16, text.num_kv_heads, text.head_dim)
    pages = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    arena = torch.randn(1 << 20, device=device).to(torch.bfloat16)
    layout_row, hidden = text.num_kv_heads * text.head_dim, text.hidden_size
    chunk = _warm_chunk(text.num_layers)
    step = build_step([chunk], num_layers=text.num_layers, block_size=16, kv_row=layout_row, hidden=hidden)
    padded_shape = shape_for(step)
    assert padded_shape is not None
    padded = PaddedStep.empty(padded_shape, 16)
    pad_step(step, padded_shape, padded)
    tensors = [torch.from_numpy(array).to(device) for array in padded.arrays()]
    expected = padded_logits(language, tensors, padded_shape, pages, arena)[:1].clone()
    written = pages.clone()
    edges = tuple(text.num_layers * i // 4 for i in range(5))
    graphs = GroupedForward(language, pages, arena)
    assert graphs.begin(step, edges) is None and graphs.begin(step, edges) is None, "nobody waits for a capture"
    assert graphs.capture_next() and not graphs.capture_next()
    for _ in range(3):
        pages.zero_()
        replay = graphs.begin(step, edges)
        assert replay is not None
        for start, stop in pairwise(edges):
            replay.run(start, stop)
            torch.randn(1 << 16, device=device)  # somebody else's work in between
        assert torch.equal(replay.result().logits, expected)
        assert torch.equal(pages, written)


def _warm_chunk(num_layers: int) -> ChunkWork:
    depths = np.zeros(100, np.int32)
    depths[:10] = num_layers
    positions = np.tile(np.arange(120, dtype=np.int32), (3, 1))
    span = SpanWork(8, 100, depths, kv_base=0, embed_base=512)
    return ChunkWork(np.arange(1, 121), positions, np.arange(8), 0, 120, True, [span])
