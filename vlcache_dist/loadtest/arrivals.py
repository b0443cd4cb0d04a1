"""When requests are sent: schedules made before the first one. Pure."""

from __future__ import annotations

import random
from typing import Literal

from vlcache_dist.errors import ConfigError

Process = Literal["poisson", "constant"]


def schedule(count: int, rate: float, seed: int, process: Process = "poisson") -> list[float]:
    """Seconds after the start, ascending, of ``count`` arrivals at ``rate`` per second.

    ``poisson``: exponential gaps, scaled so that the last arrival falls where a constant rate would put it; two runs
    of one rate then offer the same load whatever the seed. Raises ConfigError for a rate that is not positive.
    """
    if rate <= 0:
        raise ConfigError(f"rate = {rate}: requests per second must be positive")
    if process == "constant":
        return [number / rate for number in range(count)]
    rng = random.Random(f"arrivals {seed}")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    stretch = (count - 1) / rate / times[-1] if count > 1 and times[-1] > 0 else 1.0
    return [time * stretch for time in times]
