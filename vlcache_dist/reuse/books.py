"""The guard's books: per format of prompts what shadows showed, and the level that follows. Pure, and mergeable.

One shard of the directory keeps the books of all workers; a worker acts on a copy plus what it has seen itself since.
Sequential tests allow no merging of two statistics that have counted the same run, hence:

* an ``Observation`` is numbered by its worker, and a book remembers the last number that it has counted of each: it
  counts every observation once, however often it is told;
* what was seen at one level says nothing of another: it is noted as drift, and is no evidence;
* of two books that have lost sight of each other (the directory was restarted) the one that has seen more is taken up,
  and they are never added. What is lost with the other one is lost whatever it said, so the bounds of
  ``reuse.evidence`` hold for what is left.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from vlcache_dist.reuse.evidence import HARMED, HarmDetector, HealthEvidence, wilson_upper
from vlcache_dist.reuse.ladder import Level
from vlcache_dist.types import WorkerId

HARMFUL_KL = 0.1  #: nats, of the first token
MAX_FORMATS = 256
MAX_WORKERS = 256  #: whose numbers a book remembers
TRIPS_AT = 50_000.0  #: 500 healthy runs trip with probability 1 % at most (``reuse.evidence``)


class Shadow(msgspec.Struct, frozen=True):
    """An approximate run against the full one. ``alarmed``: the canary called, so the client got the full answer."""

    kl: float
    agrees: bool
    alarmed: bool

    @property
    def harmed(self) -> bool:
        return not self.agrees or self.kl > HARMFUL_KL


class Observation(msgspec.Struct, frozen=True):
    """A shadow as it is told to others. ``number``: of this worker's, rising. ``level``: in force when the request
    began. ``least``: the first level that changes its plan. ``requests``: of the format since the last one told of."""

    number: int
    format: str
    level: int
    least: int
    shadow: Shadow
    requests: int = 0


class Drift(msgspec.Struct):
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


class Standing(msgspec.Struct, frozen=True):
    """A book as it travels. ``moves``: how often the level has changed. ``evidence``: of harm, one number per
    hypothesis; ``health``: log ratio. ``runs``, ``harmed``: at this level. ``counted``: see the module."""

    format: str
    level: int = 0
    moves: int = 0
    drift: Drift = msgspec.field(default_factory=Drift)
    evidence: tuple[float, ...] = (0.0,) * len(HARMED)
    health: float = 0.0
    runs: int = 0
    harmed: int = 0
    counted: dict[WorkerId, int] = {}

    @property
    def rank(self) -> tuple[int, int]:
        """How much it has seen: level changes, then shadows."""
        return self.moves, self.drift.shadows


class Book:
    """Of one format. ``trips_at``: see ``HarmDetector``."""

    def __init__(self, standing: Standing, trips_at: float = TRIPS_AT) -> None:
        self.format = standing.format
        self.level = Level(standing.level)
        self.moves = standing.moves
        self.drift = msgspec.structs.replace(standing.drift)
        self.detector = HarmDetector(trips_at, standing.evidence)
        self.health = HealthEvidence(log_ratio=standing.health)
        self.runs, self.harmed = standing.runs, standing.harmed
        self.counted = dict(standing.counted)

    def standing(self) -> Standing:
        return Standing(
            self.format,
            int(self.level),
            self.moves,
            msgspec.structs.replace(self.drift),
            self.detector.statistics,
            self.health.log_ratio,
            self.runs,
            self.harmed,
            dict(self.counted),
        )

    def observe(self, worker_id: WorkerId, seen: Observation) -> None:
        """Count a worker's observation, unless it has been counted."""
        if seen.number <= self.counted.get(worker_id, 0):
            return
        self.counted.pop(worker_id, None)
        self.counted[worker_id] = seen.number
        if len(self.counted) > MAX_WORKERS:
            del self.counted[next(iter(self.counted))]
        self._note(seen)
        if seen.level == self.level:
            self._judge(seen)
        self.drift.harm_at_most = wilson_upper(self.harmed, self.runs)

    def _judge(self, seen: Observation) -> None:
        harmed = seen.shadow.harmed and (not seen.shadow.alarmed or self.level is Level.OFF)
        self.runs += 1
        self.harmed += harmed
        if self.level < Level.OFF and self.detector.observe(harmed):
            self.drift.trips += 1
            # From a plan that fails often there is no point in small steps.
            step = Level(self.level + 1) if self.harmed * 5 < self.runs else Level.OFF
            self._move(Level(min(max(step, seen.least), Level.OFF)))
        elif self.level > Level.NORMAL and self.health.observe(harmed):
            lower = Level(self.level - 1)
            self._move(lower if lower >= seen.least else Level.NORMAL)

    def _move(self, level: Level) -> None:
        self.level = level
        self.moves += 1
        self.detector.restart()
        self.health = HealthEvidence()
        self.runs = self.harmed = 0

    def _note(self, seen: Observation) -> None:
        drift, shadow = self.drift, seen.shadow
        drift.requests += seen.requests
        drift.shadows += 1
        drift.kl += (shadow.kl - drift.kl) / drift.shadows
        drift.agreement += (float(shadow.agrees) - drift.agreement) / drift.shadows
        drift.harmed += shadow.harmed
        drift.missed_alarms += shadow.harmed and not shadow.alarmed
        drift.false_alarms += shadow.alarmed and not shadow.harmed


class Books:
    """Of one model, all formats: what the directory keeps. The format that was seen longest ago is forgotten first."""

    def __init__(self) -> None:
        self._books: OrderedDict[str, Book] = OrderedDict()

    def observe(self, worker_id: WorkerId, seen: Observation) -> None:
        book = self._books.get(seen.format)
        if book is None:
            book = self._keep(Book(Standing(seen.format)))
        self._books.move_to_end(seen.format)
        book.observe(worker_id, seen)

    def take_up(self, standing: Standing) -> None:
        """A worker's copy of the books that were kept before: the one that has seen most is taken up."""
        own = self._books.get(standing.format)
        if own is None or own.standing().rank < standing.rank:
            self._keep(Book(standing))

    def standings(self) -> tuple[Standing, ...]:
        return tuple(book.standing() for book in self._books.values())

    def _keep(self, book: Book) -> Book:
        self._books[book.format] = book
        if len(self._books) > MAX_FORMATS:
            self._books.popitem(last=False)
        return book
