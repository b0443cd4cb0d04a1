"""The live guard: a sampled share of approximate requests is compared with a full run, and what is seen decides how
careful reuse is, per format of prompts. Pure: no clock, no threads; randomness and durations are given.

::

    request ── decide ──> the level in force, and: shadow it? (sampling; boosted while there is suspicion)
    shadow  ── observe ─> drift of its format; enough evidence of harm: one level up; enough of health: one down
    prefill ── worked ──> seconds that the budget is a share of;  ``affords``/``spent``: shadows stay within it

At OFF nothing is approximated, so there is nothing to shadow: sampled requests try reuse in line instead and throw the
result away before the first token (``ladder.always_alarmed``).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any

from vlcache_dist.reuse.evidence import HarmDetector, HealthEvidence, wilson_upper
from vlcache_dist.reuse.ladder import Level, first_step
from vlcache_dist.reuse.plan import Plan

HARMFUL_KL = 0.1  #: nats, of the first token
SUSPICION = 5e-4  #: of the evidence that trips: from here on a format is sampled more often
BOOST = 4  #: times the usual sampling, while suspicious or recovering
MAX_FORMATS = 256
START_SHARE = 0.02  #: sampled before the costs of shadows are known
BURST_S = 2.0  #: budget that may be saved up


@dataclass(frozen=True, slots=True)
class Shadow:
    """An approximate run against the full one. ``alarmed``: the canary called, so the client got the full answer."""

    kl: float
    agrees: bool
    alarmed: bool

    @property
    def harmed(self) -> bool:
        return not self.agrees or self.kl > HARMFUL_KL


@dataclass(frozen=True, slots=True)
class Decision:
    """``level`` in force for the request; ``sampled``: compare it (in the background; at OFF in line)."""

    level: Level
    sampled: bool


@dataclass(slots=True)
class Drift:
    """What shadows of a format showed. ``kl``: mean. ``missed_alarms``: harmed although the canary was calm;
    ``false_alarms``: it called and the first token would have been right. ``harm_at_most``: one-sided 95 % (Wilson), of
    calm runs at the level in force."""

    requests: int = 0
    shadows: int = 0
    kl: float = 0.0
    agreement: float = 1.0
    harmed: int = 0
    missed_alarms: int = 0
    false_alarms: int = 0
    trips: int = 0
    harm_at_most: float = 1.0


class _Format:
    def __init__(self, trips_at: float, threshold: float) -> None:
        self.level = Level.NORMAL
        self.drift = Drift()
        self.detector = HarmDetector(trips_at)
        self.health = HealthEvidence()
        self.credit, self.threshold = 0.0, threshold
        self.runs = self.harmed = 0  # calm ones at this level


class Guard:
    """One model's. ``budget``: share of prefill time that shadows may take (0: the guard is off). ``sampling``: share
    of requests that are sampled, instead of what the budget affords. ``false_trip``: the probability with which a
    healthy format may trip within ``horizon`` shadow runs (``evidence``: a bound, not an estimate)."""

    def __init__(
        self,
        budget: float = 0.02,
        sampling: float | None = None,
        *,
        false_trip: float = 0.01,
        horizon: int = 500,
        seed: int = 0,
    ) -> None:
        self.budget = budget
        self._forced = sampling
        self._trips_at = horizon / false_trip
        self._rng = random.Random(seed)
        self._formats: OrderedDict[str, _Format] = OrderedDict()
        self._requests = 0
        self._worked_s = self._spent_s = 0.0
        self._saved_s = BURST_S
        self._mean_shadow_s = 0.0
        self._runs = 0

    @property
    def active(self) -> bool:
        return self.budget > 0

    # -- decisions ----------------------------------------------------------------------------------------------

    def decide(self, format_: str) -> Decision:
        """For one approximate request of a format."""
        if not self.active:
            return Decision(Level.NORMAL, False)
        state = self._state(format_)
        state.drift.requests += 1
        self._requests += 1
        careful = state.level > Level.NORMAL or state.detector.value > SUSPICION
        state.credit += min(1.0, self.sampling * (BOOST if careful else 1))
        if state.credit < state.threshold:
            return Decision(state.level, False)
        # A gap drawn from (0, 2) in units of its mean: periodic traffic cannot hide, and there are no long gaps.
        state.credit, state.threshold = 0.0, 2 * self._rng.random()
        return Decision(state.level, True)

    @property
    def sampling(self) -> float:
        """Share of requests to shadow: what was asked for, or what the budget affords at the costs so far."""
        if self._forced is not None:
            return self._forced
        if not self._mean_shadow_s or not self._requests:
            return START_SHARE
        return min(1.0, self.budget * self._worked_s / self._requests / self._mean_shadow_s)

    def observe(self, format_: str, plan: Plan, shadow: Shadow) -> Level:
        """What a shadow of a request with ``plan`` (as asked for) showed; returns the format's level from now on."""
        state = self._state(format_)
        self._note(state, shadow)
        harmed = shadow.harmed and (not shadow.alarmed or state.level is Level.OFF)
        state.runs += 1
        state.harmed += harmed
        if state.level < Level.OFF and state.detector.observe(harmed):
            state.drift.trips += 1
            # From a plan that fails often there is no point in small steps.
            step = Level(state.level + 1) if state.harmed * 5 < state.runs else Level.OFF
            self._move(state, min(max(step, first_step(plan)), Level.OFF))
        elif state.level > Level.NORMAL and state.health.observe(harmed):
            lower = Level(state.level - 1)
            self._move(state, lower if lower >= first_step(plan) else Level.NORMAL)
        state.drift.harm_at_most = wilson_upper(state.harmed, state.runs)
        return state.level

    def _move(self, state: _Format, level: Level) -> None:
        state.level = level
        state.detector.restart()
        state.health = HealthEvidence()
        state.runs = state.harmed = 0

    def _note(self, state: _Format, shadow: Shadow) -> None:
        drift = state.drift
        drift.shadows += 1
        drift.kl += (shadow.kl - drift.kl) / drift.shadows
        drift.agreement += (float(shadow.agrees) - drift.agreement) / drift.shadows
        drift.harmed += shadow.harmed
        drift.missed_alarms += shadow.harmed and not shadow.alarmed
        drift.false_alarms += shadow.alarmed and not shadow.harmed

    def _state(self, format_: str) -> _Format:
        state = self._formats.get(format_)
        if state is None:
            if len(self._formats) >= MAX_FORMATS:
                self._formats.popitem(last=False)
            state = self._formats[format_] = _Format(self._trips_at, self._rng.random())
        self._formats.move_to_end(format_)
        return state

    # -- budget -------------------------------------------------------------------------------------------------

    def worked(self, seconds: float) -> None:
        """Prefill time of requests has passed."""
        self._worked_s += seconds
        self._saved_s = min(self._saved_s + self.budget * seconds, BURST_S)

    @property
    def affords(self) -> bool:
        """A shadow run may start. Forced sampling is not held back."""
        return self._forced is not None or self._saved_s > 0

    def spent(self, seconds: float) -> None:
        """Prefill time of a shadow run."""
        self._spent_s += seconds
        self._saved_s -= seconds
        self._runs += 1
        self._mean_shadow_s += (seconds - self._mean_shadow_s) / min(self._runs, 100)

    def status(self) -> dict[str, Any]:
        """For people: drift and level per format, costs."""
        return {
            "sampling": round(self.sampling, 6) if self.active else 0.0,
            "prefill_s": round(self._worked_s, 3),
            "shadow_s": round(self._spent_s, 3),
            "formats": {
                name: {"level": state.level.name.lower(), "level_number": int(state.level), **asdict(state.drift)}
                for name, state in self._formats.items()
            },
        }
