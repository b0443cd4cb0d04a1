"""The live guard: a sampled share of approximate requests is compared with a full run, and what is seen decides how
careful reuse is, per format of prompts. Pure: no clock, no threads; randomness and durations are given.

::

    request ── decide ──> the level in force, and: shadow it? (sampling; boosted while there is suspicion)
    shadow  ── observe ─> drift of its format; enough evidence of harm: one level up; enough of health: one down
    prefill ── worked ──> seconds that the budget is a share of;  ``affords``/``spent``: shadows stay within it
    others  ── told ────> what is to be told to the common books;  ``take_up``: what they say, own news counted on top

At OFF nothing is approximated, so there is nothing to shadow: sampled requests try reuse in line instead and throw the
result away before the first token (``ladder.always_alarmed``).
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from vlcache_dist.reuse.books import MAX_FORMATS, TRIPS_AT, Book, Observation, Shadow, Standing
from vlcache_dist.reuse.ladder import Level, first_step
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.types import WorkerId

SUSPICION = 5e-4  #: of the evidence that trips: from here on a format is sampled more often
BOOST = 4  #: times the usual sampling, while suspicious or recovering
START_SHARE = 0.02  #: sampled before the costs of shadows are known
BURST_S = 2.0  #: budget that may be saved up
MAX_NEWS = 1024  #: observations that wait for the common books; older ones are this worker's for good


@dataclass(frozen=True, slots=True)
class Decision:
    """``level`` in force for the request; ``sampled``: compare it (in the background; at OFF in line)."""

    level: Level
    sampled: bool


class _Format:
    """``common``: the books of all workers as last heard; ``book``: with this worker's news on top."""

    def __init__(self, name: str, threshold: float) -> None:
        self.common = Standing(name)
        self.book = Book(self.common)
        self.credit, self.threshold = 0.0, threshold
        self.untold = 0  # requests
        self.own = {"shadows": 0, "missed_alarms": 0, "rises": 0}

    def follow(self, book: Book) -> None:
        """``book`` is in force from now on."""
        self.own["rises"] += book.level > self.book.level
        self.book = book


class Guard:
    """One worker's. ``budget``: share of prefill time that shadows may take (0: the guard is off). ``sampling``: share
    of requests that are sampled, instead of what the budget affords. ``owner`` names the worker in common books."""

    def __init__(
        self, budget: float = 0.02, sampling: float | None = None, *, seed: int = 0, owner: WorkerId = ""
    ) -> None:
        self.budget = budget
        self.owner = owner
        self._forced = sampling
        self._rng = random.Random(seed)
        self._formats: OrderedDict[str, _Format] = OrderedDict()
        self._news: deque[Observation] = deque()
        self._numbered = 0
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
        state.untold += 1
        self._requests += 1
        level = state.book.level
        careful = level > Level.NORMAL or state.book.detector.value > SUSPICION
        state.credit += min(1.0, self.sampling * (BOOST if careful else 1))
        if state.credit < state.threshold:
            return Decision(level, False)
        # A gap drawn from (0, 2) in units of its mean: periodic traffic cannot hide, and there are no long gaps.
        state.credit, state.threshold = 0.0, 2 * self._rng.random()
        return Decision(level, True)

    @property
    def sampling(self) -> float:
        """Share of requests to shadow: what was asked for, or what the budget affords at the costs so far."""
        if self._forced is not None:
            return self._forced
        if not self._mean_shadow_s or not self._requests:
            return START_SHARE
        return min(1.0, self.budget * self._worked_s / self._requests / self._mean_shadow_s)

    def observe(self, format_: str, plan: Plan, shadow: Shadow, level: Level | None = None) -> Level:
        """What a shadow of a request with ``plan`` (as asked for) showed that began at ``level`` (None: the one in
        force now); returns the format's level from now on."""
        state = self._state(format_)
        self._numbered += 1
        at = state.book.level if level is None else level
        seen = Observation(self._numbered, format_, int(at), int(first_step(plan)), shadow, state.untold)
        state.untold = 0
        state.own["shadows"] += 1
        state.own["missed_alarms"] += shadow.harmed and not shadow.alarmed
        before = state.book.level
        state.book.observe(self.owner, seen)
        state.own["rises"] += state.book.level > before
        self._news.append(seen)
        if len(self._news) > MAX_NEWS:
            oldest = self._news.popleft()
            base = Book(self._state(oldest.format).common, TRIPS_AT)
            base.observe(self.owner, oldest)
            self._state(oldest.format).common = base.standing()
        return state.book.level

    def _state(self, format_: str) -> _Format:
        state = self._formats.get(format_)
        if state is None:
            if len(self._formats) >= MAX_FORMATS:
                self._formats.popitem(last=False)
            state = self._formats[format_] = _Format(format_, self._rng.random())
        self._formats.move_to_end(format_)
        return state

    # -- the common books ---------------------------------------------------------------------------------------

    @property
    def news(self) -> tuple[Observation, ...]:
        """What the common books have not confirmed, oldest first."""
        return tuple(self._news)

    def common(self) -> tuple[Standing, ...]:
        """The common books as last heard."""
        return tuple(state.common for state in self._formats.values())

    def take_up(self, standings: Iterable[Standing]) -> list[tuple[str, Level]]:
        """What the common books say now. Own news that they have not counted is counted on top. Returns the formats
        whose level this changed."""
        changed = []
        for standing in standings:
            state = self._state(standing.format)
            before, book = state.book.level, Book(standing)
            state.common = standing
            counted = standing.counted.get(self.owner, 0)
            self._news = deque(n for n in self._news if n.format != standing.format or n.number > counted)
            for seen in self._news:
                if seen.format == standing.format:
                    book.observe(self.owner, seen)
            state.follow(book)
            if state.book.level is not before:
                changed.append((standing.format, state.book.level))
        return changed

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
        """For people: drift and level per format (all workers', and own news; ``own``: what this one compared,
        and how often it became more careful), own costs."""
        return {
            "sampling": round(self.sampling, 6) if self.active else 0.0,
            "prefill_s": round(self._worked_s, 3),
            "shadow_s": round(self._spent_s, 3),
            "untold": len(self._news),
            "formats": {
                name: {
                    "level": state.book.level.name.lower(),
                    "level_number": int(state.book.level),
                    "workers": len(state.book.counted),
                    **msgspec.to_builtins(state.book.drift),
                    "requests": state.book.drift.requests + state.untold,
                    "own": dict(state.own),
                }
                for name, state in self._formats.items()
            },
        }
