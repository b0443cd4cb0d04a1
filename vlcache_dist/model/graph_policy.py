"""Which graph a step is replayed from, and which graph is captured next. Pure: shapes in, decisions out.

Capturing takes as long as ten steps, so nobody waits for it::

    at start     the plan, in order, for as long as the settings allow
    when idle    shapes that no graph held, twice, the latest first; then the rest of the plan; then shapes that keep
                 coming back although a larger graph holds them
    in a step    nothing: it is replayed from the fastest graph that holds it, or launched kernel by kernel

Beyond the most graphs there may be, the least recently used is given up, planned ones last: they hold what comes once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

S = TypeVar("S", bound=Hashable)
SEEN_AGAIN = 2  #: uses after which a shape that no graph holds gets one
WORTH_ITS_OWN = 3  #: uses after which a shape that a larger graph holds gets a graph of its own
_REMEMBERED = 1024  #: shapes without a graph of their own


@dataclass(frozen=True, slots=True)
class GraphReport:
    """``captured`` graphs are there, ``planned`` and ``wanted`` shapes may still get one; passes that were replayed
    from a graph of their own shape or of a larger one, and that were launched kernel by kernel although they have a
    shape; ``capture_s``: seconds that capturing has taken."""

    captured: int
    planned: int
    wanted: int
    replayed: int
    replayed_larger: int
    launched: int
    capture_s: float


class GraphPolicy(Generic[S]):
    """``holds(graph, step)``: a step of this least shape can be padded to the graph's, and that pays; ``cost``: order
    of the graphs that do, the cheapest first; at most ``limit`` graphs."""

    def __init__(self, holds: Callable[[S, S], bool], cost: Callable[[S], Any], limit: int) -> None:
        self._holds, self._cost, self._limit = holds, cost, limit
        self._captured: OrderedDict[S, None] = OrderedDict()  # the least recently used first
        self._given_up: set[S] = set()
        self._planned: OrderedDict[S, None] = OrderedDict()
        self._kept: set[S] = set()  # captured, of the plan
        self._wanted: OrderedDict[S, int] = OrderedDict()  # uses; the latest last
        self._larger: dict[S, S | None] = {}  # what ``_find`` said, until graphs come or go
        self._replayed = self._replayed_larger = self._launched = 0
        self._capture_s = 0.0

    def plan(self, shapes: Iterable[S]) -> None:
        """Capture these as well, in this order, before or between requests."""
        for shape in shapes:
            if shape not in self._captured and shape not in self._given_up:
                self._planned[shape] = None

    def use(self, shape: S) -> S | None:
        """A step of this least shape is about to run: the graph to replay, None if there is none that pays."""
        graph = shape if shape in self._captured else self._find(shape)
        if graph != shape and shape not in self._given_up:
            self._wanted[shape] = self._wanted.pop(shape, 0) + 1
            if len(self._wanted) > _REMEMBERED:
                self._wanted.popitem(last=False)
        if graph is None:
            self._launched += 1
            return None
        self._captured.move_to_end(graph)
        self._replayed += graph == shape
        self._replayed_larger += graph != shape
        return graph

    def next(self) -> S | None:
        """The shape to capture now, if there is nothing else to do; None if that is not worth it."""
        again = [shape for shape, uses in reversed(self._wanted.items()) if uses >= SEEN_AGAIN]
        bare = next((shape for shape in again if self._find(shape) is None), None)
        if bare is not None:
            return bare
        if self._planned:
            return next(iter(self._planned))
        return next((shape for shape in again if self._wanted[shape] >= WORTH_ITS_OWN), None)

    def make_room(self) -> S | None:
        """The graph to give up before another one is captured; None while there is room."""
        if len(self._captured) < self._limit:
            return None
        shape = next((shape for shape in self._captured if shape not in self._kept), next(iter(self._captured)))
        del self._captured[shape]
        self._kept.discard(shape)
        self._larger.clear()
        return shape

    def captured(self, shape: S, took_s: float) -> None:
        """Its graph is there."""
        self._capture_s += took_s
        if shape in self._planned:
            self._kept.add(shape)
        self._settled(shape)
        self._captured[shape] = None
        self._larger.clear()

    def give_up(self, shape: S) -> None:
        """It cannot be captured: no attempt is made again."""
        self._settled(shape)
        self._given_up.add(shape)

    def report(self) -> GraphReport:
        return GraphReport(
            captured=len(self._captured),
            planned=len(self._planned),
            wanted=len(self._wanted),
            replayed=self._replayed,
            replayed_larger=self._replayed_larger,
            launched=self._launched,
            capture_s=self._capture_s,
        )

    def _settled(self, shape: S) -> None:
        self._planned.pop(shape, None)
        self._wanted.pop(shape, None)

    def _find(self, shape: S) -> S | None:
        """The cheapest other graph that holds it."""
        if shape not in self._larger:
            if len(self._larger) > _REMEMBERED:
                self._larger.clear()
            able = (graph for graph in self._captured if graph != shape and self._holds(graph, shape))
            self._larger[shape] = min(able, key=self._cost, default=None)
        return self._larger[shape]
