"""Sampling: greedy, filters against a plain reference, seeds, logprobs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlcache_dist.model.sampler import Sampled, SamplingBatch, sample, uniform
from vlcache_dist.types import SamplingParams

VOCAB = 50
FIXED = [
    0.883310808101669,
    0.43152799690142274,
    0.7497482411563396,
    0.5141175577882677,
    0.7741445493884385,
    0.30762045783922076,
]


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(scores: torch.Tensor, params: list[SamplingParams], steps: list[int] | None = None) -> Sampled:
    return sample(scores, SamplingBatch.build(params, steps or [0] * len(params), "cpu"))


def reference(scores: np.ndarray, p: SamplingParams, u: float) -> int:
    """Sort, cut, renormalize, walk: as a textbook does it."""
    scaled = np.exp((scores - scores.max()) / p.temperature)
    ranked = np.argsort(-scaled, kind="stable")
    if p.top_k:
        ranked = ranked[: p.top_k]
    mass = scaled[ranked] / scaled[ranked].sum()
    if p.top_p < 1:
        ranked = ranked[: 1 + int((np.cumsum(mass) < p.top_p).sum())]
    kept = np.sort(ranked)
    cdf = np.cumsum(scaled[kept]) / scaled[kept].sum()
    return int(kept[np.searchsorted(cdf, u, side="right")])


def test_greedy_takes_the_most_likely() -> None:
    scores = logits(5)
    assert draw(scores, [SamplingParams()] * 5).token_ids.tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.05, 0.0])
def test_filters_against_the_reference(top_k: int, top_p: float) -> None:
    params = [SamplingParams(temperature=t, top_p=top_p, top_k=top_k, seed=s) for t in (0.3, 1, 2) for s in range(40)]
    scores = logits(len(params), seed=top_k)
    got = draw(scores, params).token_ids.tolist()
    draws = uniform([p.seed for p in params], [0] * len(params))
    assert got == [reference(x.double().numpy(), p, u) for x, p, u in zip(scores, params, draws, strict=True)]


def test_frequencies_follow_the_distribution() -> None:
    row = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, -torch.inf]])
    count = 20_000
    params = [SamplingParams(temperature=0.7, seed=3)] * count
    got = np.bincount(draw(row.expand(count, -1), params, list(range(count))).token_ids, minlength=6) / count
    np.testing.assert_allclose(got, (row[0] / 0.7).softmax(-1), atol=0.012)
    assert got[5] == 0


def test_same_seed_and_step_same_token_whatever_the_batch() -> None:
    rows = logits(8)
    params = [SamplingParams(temperature=1.5, top_p=(1.0, 0.8)[i % 2], seed=i) for i in range(8)]
    steps = [3 * i for i in range(8)]
    together = draw(rows, params, steps).token_ids.tolist()
    alone = [draw(rows[i : i + 1], params[i : i + 1], steps[i : i + 1]).token_ids.item() for i in range(8)]
    turned = draw(rows.flip(0), params[::-1], steps[::-1]).token_ids.flip(0).tolist()
    assert together == alone == turned


def test_draws_are_fixed_for_all_time() -> None:
    """A worker of another version must continue a request with the same tokens."""
    assert uniform([0], [0])[0] == uniform([2**64], [0])[0]  # seeds count modulo 2**64
    draws = uniform([0, 0, 1, 2**63, -1, 12345], [0, 1, 0, 7, 7, 1000])
    assert draws.tolist() == FIXED
    assert len(set(draws.tolist())) == 6


def test_draws_are_uniform_and_uncorrelated() -> None:
    grid = uniform(np.repeat(np.arange(200), 200).tolist(), np.tile(np.arange(200), 200).tolist()).reshape(200, 200)
    assert grid.min() >= 0 and grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-32])
def test_impossible_tokens_are_never_drawn(u: float) -> None:
    """Also where a draw falls exactly on a step of the distribution function."""
    row = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    batch = SamplingBatch.build([SamplingParams(temperature=1.0)], [0], "cpu")
    batch.draw.fill_(u)
    assert sample(row, batch).token_ids.item() == (1 if u < 0.5 else 3)


def test_mixed_batch_keeps_greedy_rows_greedy() -> None:
    rows = logits(6)
    params = [SamplingParams(temperature=0 if i % 2 else 5.0, top_k=3 if i == 0 else 0, seed=i) for i in range(6)]
    got = draw(rows, params).token_ids
    assert got[1::2].tolist() == rows[1::2].argmax(-1).tolist()


def test_temperature_near_zero_is_greedy() -> None:
    rows = logits(4)
    got = draw(rows, [SamplingParams(temperature=1e-30, seed=i) for i in range(4)]).token_ids
    assert got.tolist() == rows.argmax(-1).tolist()


def test_logprobs_are_of_the_unfiltered_distribution() -> None:
    rows = logits(3)
    params = [
        SamplingParams(logprobs=4),
        SamplingParams(temperature=0.5, top_k=1, seed=1, logprobs=0),
        SamplingParams(temperature=1.0),
    ]
    result = draw(rows, params)
    tokens, logprobs = result.to_host(params)
    expected = rows.log_softmax(-1)
    first, second, third = logprobs
    assert first is not None and second is not None and third is None
    assert first.token_id == tokens[0]
    assert first.logprob == pytest.approx(float(expected[0, tokens[0]]))
    best = expected[0].topk(4)
    assert [i for i, _ in first.top] == best.indices.tolist()
    assert [v for _, v in first.top] == pytest.approx(best.values.tolist())
    assert second.top == () and second.logprob == pytest.approx(float(expected[1, tokens[1]]))


def test_no_logprobs_unless_asked() -> None:
    params = [SamplingParams()] * 2
    result = draw(logits(2), params)
    assert result.logprob is None
    assert result.to_host(params)[1] == [None, None]


def test_more_logprobs_than_tokens() -> None:
    params = [SamplingParams(logprobs=VOCAB + 10)]
    (only,) = draw(logits(1), params).to_host(params)[1]
    assert only is not None and len(only.top) == VOCAB


def test_no_rows() -> None:
    params: list[SamplingParams] = []
    assert draw(logits(0), params).to_host(params) == ([], [])
