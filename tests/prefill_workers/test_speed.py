"""Forward passes' cost, per pass and per token, from running totals."""

from __future__ import annotations

import random

import pytest

from vlcache_dist.prefill_workers.speed import PassSpeed


def run(mixes: list[tuple[int, int]], pass_s: float, token_s: float, noise: float = 0.0) -> PassSpeed:
    """Measurements of (passes, rows), each of the cost given."""
    speed, rng = PassSpeed(), random.Random(0)
    passes, rows, seconds = 0, 0, 0.0
    for p, r in mixes:
        passes, rows = passes + p, rows + r
        seconds += (p * pass_s + r * token_s) * (1 + rng.uniform(-noise, noise))
        speed.observe(passes, rows, seconds)
    return speed


MIXED = [(40, 4000), (30, 60_000), (50, 20_000), (20, 1500), (30, 70_000)] * 3


@pytest.mark.parametrize(("pass_s", "token_s"), [(7e-3, 2e-5), (2e-3, 5e-4), (1e-3, 1e-6)])
def test_passes_and_tokens_are_told_apart(pass_s: float, token_s: float) -> None:
    exact = run(MIXED, pass_s, token_s)
    assert (exact.pass_s, exact.token_s) == pytest.approx((pass_s, token_s), rel=0.1)
    noisy = run(MIXED, pass_s, token_s, noise=0.1)
    for p, r in MIXED[:5]:
        assert p * noisy.pass_s + r * noisy.token_s == pytest.approx(p * pass_s + r * token_s, rel=0.3)


def test_one_mix_is_explained_as_a_whole() -> None:
    speed = run([(100, 10_000)] * 10, 4e-3, 4e-5)
    assert speed.pass_s >= 0 and speed.token_s >= 0
    assert 100 * speed.pass_s + 10_000 * speed.token_s == pytest.approx(0.8, rel=0.02)


def test_the_latest_measurements_count_most() -> None:
    speed = PassSpeed()
    passes, rows, seconds = 0, 0, 0.0
    for token_s in [1e-5] * 20 + [4e-5] * 20:
        passes, rows, seconds = passes + 10, rows + 20_000, seconds + 20_000 * token_s
        speed.observe(passes, rows, seconds)
    assert 10 * speed.pass_s + 20_000 * speed.token_s == pytest.approx(0.8, rel=0.05)


def test_nothing_is_never_negative_and_too_little_is_waited_for() -> None:
    speed = PassSpeed()
    speed.observe(1, 100, 0.01)
    assert speed.pass_s == speed.token_s == 0.0
    speed.observe(10, 1000, 0.06)
    assert speed.pass_s > 0
    falling = run([(10, 100), (10, 50_000), (20, 100), (5, 50_000)], 1e-2, 0.0)
    assert falling.token_s >= 0 and falling.pass_s == pytest.approx(1e-2, rel=0.05)
