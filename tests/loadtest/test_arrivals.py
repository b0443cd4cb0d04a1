from __future__ import annotations

import itertools
import statistics

import pytest

from vlcache_dist.errors import ConfigError
from vlcache_dist.loadtest.arrivals import schedule


@pytest.mark.parametrize("process", ["poisson", "constant"])
@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_the_offered_rate_is_met_whatever_the_seed(process: str, rate: float) -> None:
    for seed in range(5):
        times = schedule(200, rate, seed, process)  # type: ignore[arg-type]
        assert times == sorted(times) and times[0] == 0
        assert times[-1] == pytest.approx(199 / rate)


def test_poisson_gaps_are_exponential_and_reproducible() -> None:
    times = schedule(4000, 10.0, 7)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.1)  # a constant rate has none
    assert times == schedule(4000, 10.0, 7) and times != schedule(4000, 10.0, 8)


def test_one_request_and_a_rate_of_nothing() -> None:
    assert schedule(1, 3.0, 0) == [0.0]
    with pytest.raises(ConfigError, match="rate"):
        schedule(10, 0.0, 0)
