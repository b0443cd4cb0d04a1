"""Which prefill worker should take a request, and why. Pure: no I/O, no clock.

Every candidate's expected time to first token is estimated from what is known of it (queue, speed, what it holds) and
the least one wins: load first, affinity second, because a hit on a busy worker loses to a fetch on an idle one. A hot
image is thereby replicated rather than queued for. The other policies are what this one is measured against
(``bench/placement.py``).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence

import msgspec

from vlcache_dist.errors import BadRequest, WorkerLost
from vlcache_dist.types import ContentKey, WorkerId


class Costs(msgspec.Struct, frozen=True):
    """Seconds per unit, used until a worker has measured its own. Defaults suit one GPU and NVLink or shared memory.

    ``pass_s``: a forward pass besides its tokens; ``token_s``: one active token of it. ``encode_token_s``: one vision
    token of encoding. ``fetch_base_s``: a lease at another worker; ``fetch_byte_s``: reading from it.
    """

    pass_s: float = 5e-3
    token_s: float = 1 / 20_000
    encode_token_s: float = 1 / 40_000
    fetch_byte_s: float = 1 / 20e9
    fetch_base_s: float = 0.5e-3


class Candidate(msgspec.Struct, frozen=True):
    """A prefill worker as the ingress sees it. ``queued`` requests with ``queued_tokens`` active tokens wait or run
    there, those included that the ingress has sent since the last heartbeat. ``pass_s``, ``token_s`` (0: not measured
    yet), ``read_bytes_per_s`` and ``read_latency_s`` (by peer) are its own measurements."""

    worker_id: WorkerId
    name: str
    queued: int = 0
    queued_tokens: int = 0
    pass_s: float = 0.0
    token_s: float = 0.0
    read_bytes_per_s: dict[WorkerId, float] = {}
    read_latency_s: dict[WorkerId, float] = {}
    draining: bool = False


class SpanDemand(msgspec.Struct, frozen=True):
    """A span as placement sees it. ``holders``: workers that announced its KV; ``producer``: who is computing it now;
    ``recompute``: tokens a hit costs."""

    key: ContentKey
    tokens: int
    kv_bytes: int
    recompute: int
    holders: frozenset[WorkerId] = frozenset()
    encoded: bool = False  #: somebody holds the encoder output
    producer: WorkerId | None = None

    @property
    def sources(self) -> frozenset[WorkerId]:
        """Whoever has its KV, or will have it."""
        return self.holders if self.producer is None else self.holders | {self.producer}


class Demand(msgspec.Struct, frozen=True):
    text_tokens: int
    spans: tuple[SpanDemand, ...]
    reuse: bool  #: KV may be reused at any position


class Scored(msgspec.Struct, frozen=True):
    """A candidate with its expected seconds to the first token and the terms these are made of."""

    candidate: Candidate
    seconds: float
    why: str


class Choice(msgspec.Struct, frozen=True):
    worker_id: WorkerId
    active_tokens: int  #: what the request is expected to cost there
    expected_s: float
    why: str


def active_tokens(demand: Demand) -> int:
    """Tokens the request computes if every announced KV object can be had."""
    spans = sum(s.recompute if demand.reuse and s.sources else s.tokens for s in demand.spans)
    return demand.text_tokens + spans


def expected_ttft(candidate: Candidate, demand: Demand, costs: Costs) -> tuple[float, str]:
    """Seconds until the first token if ``candidate`` takes the request, and the terms it is made of.

    What has to be fetched or encoded comes while the queue is worked off; the request computes when both are done.
    """
    measured = candidate.pass_s > 0 or candidate.token_s > 0
    pass_s = candidate.pass_s if measured else costs.pass_s
    token_s = candidate.token_s if measured else costs.token_s
    queue = candidate.queued * pass_s + candidate.queued_tokens * token_s
    compute = pass_s + demand.text_tokens * token_s
    fetch = encode = 0.0
    seen: set[ContentKey] = set()
    for span in demand.spans:
        first = span.key not in seen
        seen.add(span.key)
        if demand.reuse and (span.sources or not first):
            compute += span.recompute * token_s
            if first and candidate.worker_id not in span.sources:
                fetch += _fetch_s(candidate, span, costs)
        else:
            compute += span.tokens * token_s
            if first and not span.encoded:
                encode += span.tokens * costs.encode_token_s
    total = max(queue, fetch, encode) + compute
    parts = " | ".join(f"{n} {s * 1e3:.1f}" for n, s in (("queue", queue), ("fetch", fetch), ("encode", encode)))
    return total, f"max({parts}) + compute {compute * 1e3:.1f} ms"


def _fetch_s(candidate: Candidate, span: SpanDemand, costs: Costs) -> float:
    """Seconds to lease and read the span's KV from the best of its holders; where none can be read from (0 B/s) as much
    as computing the span again."""
    default = 1 / costs.fetch_byte_s
    rates = {holder: candidate.read_bytes_per_s.get(holder, default) for holder in span.sources}
    reads = [candidate.read_latency_s.get(peer, 0.0) + span.kv_bytes / rate for peer, rate in rates.items() if rate > 0]
    if not reads:
        return span.tokens * (costs.token_s + costs.encode_token_s)
    return costs.fetch_base_s + min(reads)


class Turns(msgspec.Struct):
    """Who was chosen when: ``last`` maps a worker to the number of its latest turn."""

    number: int = 0
    last: dict[WorkerId, int] = {}

    def taken(self, worker_id: WorkerId) -> None:
        self.number += 1
        self.last[worker_id] = self.number

    def since(self, worker_id: WorkerId) -> int:
        return self.last.get(worker_id, -1)


Policy = Callable[[Sequence[Scored], Demand, Turns], Scored]


def least_ttft(scored: Sequence[Scored], demand: Demand, turns: Turns) -> Scored:
    """The least expected time to first token; those within 0.1 ms of each other take turns."""
    return min(scored, key=lambda s: (round(s.seconds, 4), turns.since(s.candidate.worker_id), s.candidate.worker_id))


def round_robin(scored: Sequence[Scored], demand: Demand, turns: Turns) -> Scored:
    """Whoever has waited longest for a turn."""
    return min(scored, key=lambda s: (turns.since(s.candidate.worker_id), s.candidate.worker_id))


def at_random(scored: Sequence[Scored], demand: Demand, turns: Turns) -> Scored:
    """Any; the same ones in every run."""
    return random.Random(turns.number).choice(sorted(scored, key=lambda s: s.candidate.worker_id))


def affinity(scored: Sequence[Scored], demand: Demand, turns: Turns) -> Scored:
    """Every image has a home, by rendezvous hashing; the request goes to the home of most of its vision tokens,
    whatever the queue there. Without images: in turn."""
    if not demand.spans:
        return round_robin(scored, demand, turns)
    at_home = dict.fromkeys((s.candidate.worker_id for s in scored), 0)
    for span in demand.spans:
        home = max(at_home, key=lambda name: hashlib.blake2b(span.key + name.encode(), digest_size=8).digest())
        at_home[home] += span.tokens
    return max(scored, key=lambda s: (at_home[s.candidate.worker_id], s.candidate.worker_id))


POLICIES: dict[str, Policy] = {
    "least-ttft": least_ttft,
    "affinity": affinity,
    "round-robin": round_robin,
    "random": at_random,
}


def choose(
    candidates: Sequence[Candidate],
    demand: Demand,
    costs: Costs,
    *,
    turns: Turns | None = None,
    policy: Policy = least_ttft,
    pin: str | None = None,
    exclude: Iterable[WorkerId] = (),
) -> Choice:
    """The policy's candidate.

    ``pin`` names a worker that must be used: BadRequest if there is none of that name. ``exclude`` lists workers
    that already failed this request. Raises WorkerLost if nobody is left.
    """
    excluded = set(exclude)
    if pin is not None:
        named = [c for c in candidates if pin in (c.name, c.worker_id)]
        if not named:
            known = ", ".join(sorted(c.name for c in candidates)) or "none"
            raise BadRequest(f"no prefill worker is called {pin!r} (known: {known})")
        candidates = named
    usable = [c for c in candidates if c.worker_id not in excluded and not c.draining]
    if not usable:
        raise WorkerLost("no prefill worker is available")
    scored = [Scored(c, *expected_ttft(c, demand, costs)) for c in usable]
    best = policy(scored, demand, turns or Turns())
    why = "pinned" if pin is not None else best.why
    return Choice(best.candidate.worker_id, active_tokens(demand), best.seconds, why)
