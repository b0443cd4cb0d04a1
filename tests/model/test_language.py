"""What transformers has no counterpart for: rows of unequal depth, recording, reuse, stopping between layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_oracle import BLOCK, PagedRunner, Prompt, draw_config, draw_model, draw_prompt, relative, save_checkpoint

from vlcache_dist.engine.batch import SpanWork, build_step
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.weights import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = draw_config(np.random.default_rng(11))
    config.text_config.num_hidden_layers = 4
    config.text_config.layer_types = ["full_attention"] * 4
    return Checkpoint(save_checkpoint(draw_model(config, 11), tmp_path_factory.mktemp("weights")))


@pytest.fixture
def runner(checkpoint: Checkpoint) -> PagedRunner:
    return PagedRunner(checkpoint)


@pytest.fixture
def prompt(checkpoint: Checkpoint) -> Prompt:
    drawn = draw_config(np.random.default_rng(11))
    return draw_prompt(np.random.default_rng(4), drawn, images=2, videos=1)


def spans(prompt: Prompt, runner: PagedRunner, *, depth: list[np.ndarray] | None = None) -> list[SpanWork]:
    """Fresh and recorded without ``depth``; with it, reused from what was recorded first."""
    text = runner.config.text
    work = []
    for i, (span, embed) in enumerate(zip(prompt.spans, runner.encode([prompt])[0], strict=True)):
        extent = 2 * text.num_layers * span.length * runner.kv_row
        if depth is None:
            work.append(SpanWork(span.start, span.length, embed_base=embed, record_base=runner.allocate(extent)))
        else:
            work.append(SpanWork(span.start, span.length, depths=depth[i], embed_base=embed))
    return work


def run(runner: PagedRunner, prompt: Prompt, work: list[SpanWork]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, KV [L, 2, Hkv, n, D]) of one pass over the whole prompt."""
    sequence = runner.sequence(prompt, work)
    logits = runner.step([sequence.chunk(0, sequence.length, True)])
    return logits, runner.kv(sequence, sequence.length)


def reuse(recorded: list[SpanWork], runner: PagedRunner, prompt: Prompt, counts: list[int]) -> list[SpanWork]:
    """The first counts[l] tokens of every span are recomputed in layer l."""
    depths = [
        np.array([sum(token < count for count in counts) for token in range(span.length)], np.int32)
        for span in prompt.spans
    ]
    work = spans(prompt, runner, depth=depths)
    for new, old in zip(work, recorded, strict=True):
        new.kv_base = old.record_base
    return work


def test_hit_at_the_same_positions_writes_the_same_bits(runner: PagedRunner, prompt: Prompt) -> None:
    recorded = spans(prompt, runner)
    logits, kv = run(runner, prompt, recorded)
    again, pages = run(runner, prompt, reuse(recorded, runner, prompt, [0, 0, 0, 0]))
    vision = np.concatenate([np.arange(s.start, s.end) for s in prompt.spans])
    assert torch.equal(pages[:, :, :, vision], kv[:, :, :, vision])
    assert relative(again, logits) < 1e-5
    rows = len(prompt.token_ids) - len(vision)
    assert runner.rows_per_layer == (rows,) * 4


def test_full_plan_computes_everything_again(runner: PagedRunner, prompt: Prompt) -> None:
    recorded = spans(prompt, runner)
    logits, kv = run(runner, prompt, recorded)
    for work in recorded:  # what was recorded must not matter
        runner.arena[work.record_base : work.record_base + 8 * work.length * runner.kv_row] = float("nan")
    again, pages = run(runner, prompt, reuse(recorded, runner, prompt, [10**6] * 4))
    assert relative(again, logits) < 1e-5
    assert relative(pages, kv) < 1e-5
    assert runner.rows_per_layer == (len(prompt.token_ids),) * 4


def test_partial_plan_against_a_masked_reference(runner: PagedRunner, prompt: Prompt) -> None:
    """A pyramid over foreign KV: every row's K and V of a layer are fresh exactly where the plan says so, computed by a
    dense reference that carries all tokens through all layers and overrides K and V of the reused ones."""
    counts = [6, 3, 3, 1]
    recorded = spans(prompt, runner)
    run(runner, prompt, recorded)
    for work in recorded:
        extent = runner.arena[work.record_base : work.record_base + 8 * work.length * runner.kv_row]
        extent += 0.3 * torch.randn(extent.shape, generator=torch.Generator().manual_seed(1))
    before = runner.arena.clone()
    work = reuse(recorded, runner, prompt, counts)
    logits, pages = run(runner, prompt, work)
    expected, kv = dense(runner, prompt, work)
    assert relative(logits, expected) < 1e-5
    assert relative(pages, kv) < 1e-5
    kept = before[: recorded[-1].record_base].isfinite()
    assert torch.equal(runner.arena[: recorded[-1].record_base][kept], before[: recorded[-1].record_base][kept])
    text = len(prompt.token_ids) - sum(s.length for s in prompt.spans)
    assert runner.rows_per_layer == tuple(text + sum(min(c, s.length) for s in prompt.spans) for c in counts)


def dense(runner: PagedRunner, prompt: Prompt, work: list[SpanWork]) -> tuple[torch.Tensor, torch.Tensor]:
    model, text, n = runner.model, runner.config.text, len(prompt.token_ids)
    sequence = runner.sequence(prompt, work)
    cos, sin = (x[:, None].repeat(1, 1, 2) for x in model.rope(torch.from_numpy(sequence.positions)))

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * (x.pow(2).mean(-1, keepdim=True) + text.rms_norm_eps).rsqrt()

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    x = model.embed_tokens[torch.tensor(prompt.token_ids)]
    for span in work:
        rows = runner.arena[span.embed_base : span.embed_base + span.length * text.hidden_size]
        x[span.start : span.start + span.length] = rows.view(span.length, -1)
    kv = []
    for index, layer in enumerate(model.layers):
        q, k, v = (norm(x, layer.input_norm) @ layer.qkv.T + layer.qkv_bias).split(
            (text.hidden_size, runner.kv_row, runner.kv_row), -1
        )
        for span in work:
            size = span.length * runner.kv_row
            base = span.kv_base + 2 * index * size
            kept = torch.from_numpy(span.depths <= index)
            here = slice(span.start, span.start + span.length)
            for fresh, offset in ((k, base), (v, base + size)):
                cached = runner.arena[offset : offset + size].view(span.length, -1)
                fresh[here] = torch.where(kept[:, None], cached, fresh[here])
        q, k, v = (y.view(n, -1, text.head_dim) for y in (q, k, v))
        q, k = turn(q), turn(k)
        kv.append(torch.stack([k, v]).transpose(1, 2))
        k, v = (y.repeat_interleave(text.num_heads // text.num_kv_heads, 1) for y in (k, v))
        score = torch.einsum("ihd,jhd->hij", q, k) / text.head_dim**0.5
        score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        x = x + torch.einsum("hij,jhd->ihd", score.softmax(-1), v).reshape(n, -1) @ layer.o.T
        gate, up = (norm(x, layer.post_norm) @ layer.gate_up.T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer.down.T
    return (norm(x[-1:], model.norm) @ model.lm_head.T), torch.stack(kv)


def test_stopping_between_layers_changes_nothing(runner: PagedRunner, prompt: Prompt) -> None:
    recorded = spans(prompt, runner)
    run(runner, prompt, recorded)
    work = reuse(recorded, runner, prompt, [5, 4, 2, 1])
    whole, kv = run(runner, prompt, work)
    sequence = runner.sequence(prompt, work)
    step = build_step(
        [sequence.chunk(0, sequence.length, True)],
        num_layers=4,
        block_size=BLOCK,
        kv_row=runner.kv_row,
        hidden=runner.config.text.hidden_size,
    )
    batch, scatter = ForwardBatch.from_step(step, "cpu"), ScatterBatch.from_step(step, "cpu")
    assert scatter is not None
    model, x = runner.model, runner.model.embed(batch, runner.arena)
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        assert len(x) == batch.rows_kv[start]
        model.scatter(scatter, runner.pages, runner.arena, start, stop)
        x = model.run_layers(x, batch, runner.pages, runner.arena, start, stop)
    assert relative(model.logits(x), whole) < 1e-5
    assert relative(runner.kv(sequence, sequence.length), kv) < 1e-5


def test_nothing_sampled(runner: PagedRunner, prompt: Prompt) -> None:
    """A chunk that ends before the prompt does writes its KV and returns no logits."""
    (sequence,) = runner.fresh([prompt])
    assert runner.step([sequence.chunk(0, sequence.length - 1, False)]).shape == (0, runner.config.text.vocab_size)
    split = runner.step([sequence.chunk(sequence.length - 1, sequence.length, True)])
    assert relative(split, run(runner, prompt, runner.fresh([prompt])[0].spans)[0]) < 1e-5


def test_arena_is_required_where_it_is_referred_to(runner: PagedRunner, prompt: Prompt) -> None:
    (sequence,) = runner.fresh([prompt])
    text = runner.config.text
    step = build_step(
        [sequence.chunk(0, sequence.length, True)],
        num_layers=4,
        block_size=BLOCK,
        kv_row=runner.kv_row,
        hidden=text.hidden_size,
    )
    with pytest.raises(ValueError, match="arena"):
        runner.model.forward(ForwardBatch.from_step(step, "cpu"), runner.pages, None, None)


def test_vision_tower_checks_its_input(runner: PagedRunner, prompt: Prompt) -> None:
    grids = [span.grid for span in prompt.spans]
    patches = torch.cat(prompt.patches)
    with pytest.raises(ValueError, match="the grids say"):
        runner.tower.forward(patches[:-1], grids)
    with pytest.raises(ValueError, match="multiples"):
        runner.tower.forward(patches, [(1, 3 * runner.config.vision.spatial_merge_size + 1, 2)])
    assert runner.tower.forward(patches[:0], []).shape == (0, runner.config.text.hidden_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(checkpoint: Checkpoint, prompt: Prompt, dtype: torch.dtype, tmp_path: Path) -> None:
    exact, half = PagedRunner(checkpoint), PagedRunner(checkpoint, dtype=dtype)
    want, got = (run(r, prompt, r.fresh([prompt])[0].spans)[0] for r in (exact, half))
    assert got.dtype == torch.float32
    assert relative(got, want) < 0.1
