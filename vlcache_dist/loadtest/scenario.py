"""What is asked in which order: requests with a controlled share of repeated pictures. Pure.

The unit of reuse is an image slot: one showing of a picture in a request. A slot is *repeated* if its tenant has been
shown the same picture before in the same plan. Shares are met by error diffusion instead of by chance, so that short
runs meet them as well; what was met is in ``share_of``.

    qa      independent requests; a repeated slot takes a picture shown before, by Zipf over the order of appearance
    window  agents that see the last N screenshots; new ones push the oldest out
    chat    conversations; a turn repeats its whole history, a new conversation shows new pictures
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from typing import Literal

import msgspec

from vlcache_dist.errors import ConfigError

Shape = Literal["qa", "window", "chat"]


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of traffic. Sizes are (rows, columns) in cells of 28 pixels, one vision token each, multiples of 4.

    ``zipf``: exponent of popularity, 0 is uniform. ``context_change``: share of requests with other text in front of
    their pictures, which no prefix cache can answer. ``sessions``: agents or conversations under way at a time.
    """

    name: str
    shape: Shape = "qa"
    images: int = 1
    zipf: float = 1.0
    context_change: float = 1.0
    preamble_words: int = 40
    sizes: tuple[tuple[int, int], ...] = ((8, 8),)
    tenants: int = 1
    sessions: int = 4
    max_turns: int = 24
    max_tokens: int = 16


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("document-qa", images=1, sizes=((8, 8), (12, 12))),
        Scenario("multi-image", images=3),
        Scenario("agent-window", "window", images=3, sessions=3, preamble_words=20),
        Scenario("chat", "chat", images=1, sessions=4, context_change=0.0),
        Scenario("tenants", images=1, tenants=4),
    )
}


class Picture(msgspec.Struct, frozen=True):
    """``seed`` and size decide every pixel."""

    seed: int
    rows: int
    columns: int


class Turn(msgspec.Struct, frozen=True):
    """One question. ``images`` are shown with it; ``asked`` is the index of the one that it is about, among all of the
    request's images; ``fact`` picks among that picture's facts (modulo their number)."""

    images: tuple[Picture, ...]
    asked: int
    fact: int


class Planned(msgspec.Struct, frozen=True):
    """One request: its turns (the last is the question, those before it are history), the number of the text that
    stands in front (0: the tenant's usual one) and which of its image slots are repeated."""

    index: int
    tenant: int
    preamble: int
    turns: tuple[Turn, ...]
    repeated: tuple[bool, ...]

    @property
    def images(self) -> list[Picture]:
        return [picture for turn in self.turns for picture in turn.images]


def plan(scenario: Scenario, share: float, count: int, seed: int) -> list[Planned]:
    """``count`` requests in which about ``share`` of the image slots are repeated. Two seeds have no picture in
    common. Raises ConfigError for a share outside [0, 1), no requests, or impossible sizes."""
    if not 0 <= share < 1:
        raise ConfigError(
            f"reuse share = {share}: a number from 0 to below 1 is wanted (the first showing is never a hit)"
        )
    if count < 1:
        raise ConfigError(f"requests = {count}: at least 1 is wanted")
    if any(side < 4 or side % 4 for size in scenario.sizes for side in size):
        raise ConfigError(f"sizes = {scenario.sizes}: rows and columns must be multiples of 4")
    return _Planner(scenario, share, seed).plan(count)


def share_of(requests: Sequence[Planned]) -> float:
    """The share of repeated image slots that a plan really has."""
    flags = [flag for request in requests for flag in request.repeated]
    return sum(flags) / len(flags) if flags else 0.0


def zipf_index(rng: random.Random, count: int, exponent: float) -> int:
    """An index below ``count``; the first is the most popular: P(i) ~ 1 / (i + 1) ** exponent."""
    weights = list(itertools.accumulate(1 / (i + 1) ** exponent for i in range(count)))
    return min(bisect.bisect_left(weights, rng.random() * weights[-1]), count - 1)


class _Diffusion:
    """Turns a share into a sequence of decisions whose running share is as near to it as it can be."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._owed = 0.0

    def take(self, possible: bool = True, weight: float = 1.0) -> bool:
        self._owed += self._share * weight
        if possible and self._owed >= 0.5 * weight:
            self._owed -= weight
            return True
        return False


class _Tenant:
    """What a tenant has been shown, and its sessions."""

    def __init__(self) -> None:
        self.shown: list[Picture] = []
        self.sessions: list[tuple[Turn, ...]] = []
        self.windows: dict[int, list[Picture]] = {}


class _Planner:
    def __init__(self, scenario: Scenario, share: float, seed: int) -> None:
        self._scenario = scenario
        self._rng = random.Random(f"plan {scenario.name} {share} {seed}")
        self._repeat = _Diffusion(share)
        self._change = _Diffusion(scenario.context_change)
        self._tenants = [_Tenant() for _ in range(scenario.tenants)]
        self._seeds = itertools.count(seed * 1_000_003)
        self._sizes = itertools.cycle(scenario.sizes)

    def plan(self, count: int) -> list[Planned]:
        make = {"qa": self._qa, "window": self._window, "chat": self._chat}[self._scenario.shape]
        requests = []
        for index in range(count):
            number = index % self._scenario.tenants
            turns, repeated = make(self._tenants[number], index)
            preamble = index + 1 if self._change.take() else 0
            requests.append(Planned(index, number, preamble, turns, repeated))
        return requests

    def _fresh(self, tenant: _Tenant) -> Picture:
        rows, columns = next(self._sizes)
        picture = Picture(next(self._seeds), rows, columns)
        tenant.shown.append(picture)
        return picture

    def _question(self, images: Sequence[Picture], already: int = 0) -> Turn:
        asked = self._rng.randrange(already + len(images))
        return Turn(tuple(images), asked, self._rng.randrange(1 << 16))

    def _qa(self, tenant: _Tenant, index: int) -> tuple[tuple[Turn, ...], tuple[bool, ...]]:
        known = list(tenant.shown)
        images, repeated = [], []
        for _ in range(self._scenario.images):
            again = self._repeat.take(possible=bool(known))
            images.append(
                known.pop(zipf_index(self._rng, len(known), self._scenario.zipf)) if again else self._fresh(tenant)
            )
            repeated.append(again)
        return (self._question(images),), tuple(repeated)

    def _window(self, tenant: _Tenant, index: int) -> tuple[tuple[Turn, ...], tuple[bool, ...]]:
        agent = (index // self._scenario.tenants) % self._scenario.sessions
        window = tenant.windows.setdefault(agent, [])
        width = self._scenario.images
        kept = sum(self._repeat.take(possible=slot < len(window)) for slot in range(width))
        fresh = [self._fresh(tenant) for _ in range(width - kept)]
        window[:] = [*window[len(window) - kept :], *fresh]
        return (self._question(window),), (True,) * kept + (False,) * (width - kept)

    def _chat(self, tenant: _Tenant, index: int) -> tuple[tuple[Turn, ...], tuple[bool, ...]]:
        open_ones = [turns for turns in tenant.sessions if len(turns) < self._scenario.max_turns]
        if self._repeat.take(possible=bool(open_ones)):
            history = open_ones[zipf_index(self._rng, len(open_ones), self._scenario.zipf)]
            tenant.sessions.remove(history)
            turns = (*history, self._question((), already=len(history[0].images)))
        else:
            turns = (self._question([self._fresh(tenant) for _ in range(self._scenario.images)]),)
        tenant.sessions = [*tenant.sessions, turns][-self._scenario.sessions :]
        count = self._scenario.images
        return turns, (len(turns) > 1,) * count
