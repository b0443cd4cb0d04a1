"""Sequential evidence that a plan harms more requests than it may. Pure.

One number per hypothesis p1 ("a share p1 of requests is harmed"), updated per shadow run by Shiryaev and Roberts' rule

    R <- (1 + R) * L        L = p1 / p0 if harmed, (1 - p1) / (1 - p0) if not

(Shiryaev 1963, Roberts 1966; "e-detectors" in Shin, Ramdas, Rinaldo 2024). Under a harm share of p0 or less
E[L] <= 1, so R_n - n is a supermartingale, also for the mean of R over several p1, and by Doob's inequality

    P(max over k <= n of R_k >= A)  <=  n / A.

That is the whole guarantee: with A = n / a, n healthy shadow runs trip with probability a at most. No distribution is
assumed beyond each run's harm probability given the past being at most p0. How fast harm is noticed is for simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

HEALTHY = 0.005  #: p0, share of harmed requests that is put up with
HARMED = (0.5, 0.1, 0.03)  #: p1: from a plan that fails to one that is merely too weak


class HarmDetector:
    """``trips_at``: A. The state never forgets what it has not outgrown: clean runs shrink it towards a small value."""

    def __init__(self, trips_at: float, statistics: Sequence[float] = ()) -> None:
        """``statistics``: where another one stood."""
        self._trips_at = trips_at
        self._statistics = list(statistics) or [0.0] * len(HARMED)

    @property
    def statistics(self) -> tuple[float, ...]:
        """One per hypothesis, in the order of ``HARMED``."""
        return tuple(self._statistics)

    @property
    def value(self) -> float:
        """Evidence in units of the threshold: 1 and above is a trip."""
        return sum(self._statistics) / len(HARMED) / self._trips_at

    def observe(self, harmed: bool) -> bool:
        """One more shadow run; True if the evidence is enough now."""
        for i, p1 in enumerate(HARMED):
            ratio = p1 / HEALTHY if harmed else (1 - p1) / (1 - HEALTHY)
            self._statistics[i] = min((1 + self._statistics[i]) * ratio, 1e12)
        return self.value >= 1

    def restart(self) -> None:
        self._statistics = [0.0] * len(HARMED)


class HealthEvidence:
    """The other way round: a sequential probability ratio test (Wald 1945) of harm share p0 against ``unhealthy``. A
    plan that harms a share of ``unhealthy`` or more passes a first test with probability ``risk`` at most; since the
    evidence against it is bounded, it would pass in the long run, and be found again."""

    def __init__(self, unhealthy: float = 0.05, risk: float = 0.05, log_ratio: float = 0.0) -> None:
        self._unhealthy = unhealthy
        self._enough = math.log(1 / risk)
        self.log_ratio = log_ratio

    def observe(self, harmed: bool) -> bool:
        """One more run; True once the evidence of health is enough."""
        p0, p1 = HEALTHY, self._unhealthy
        step = math.log(p0 / p1) if harmed else math.log((1 - p0) / (1 - p1))
        self.log_ratio = max(self.log_ratio + step, -self._enough)  # however bad it was, the way back is bounded
        return self.log_ratio >= self._enough


def wilson_upper(harmed: int, runs: int, z: float = 1.645) -> float:
    """Upper end of Wilson's score interval of a share (one-sided 95 % at the default ``z``); 1 without runs."""
    if runs == 0:
        return 1.0
    share, spread = harmed / runs, z * z / runs
    centre = share + spread / 2
    return min(1.0, (centre + z * math.sqrt(share * (1 - share) / runs + spread / (4 * runs))) / (1 + spread))
