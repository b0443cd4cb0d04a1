"""Which prefill worker should take a request, and why. Pure: no I/O, no clock.

Every candidate's expected time to first token is estimated from what is known of it (queue, speed, what it holds) and
the least one wins: load first, affinity second, because a hit on a busy worker loses to a fetch on an idle one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from vlcache_dist.errors import BadRequest, WorkerLost
from vlcache_dist.types import ContentKey, WorkerId


class Costs(msgspec.Struct, frozen=True):
    """Seconds per unit, used until a worker has measured its own. Defaults suit one GPU and NVLink or shared memory.

    ``token_s``: one active token of prefill. ``encode_token_s``: one vision token of encoding. ``fetch_byte_s`` and
    ``fetch_base_s``: moving KV from another worker.
    """

    token_s: float = 1 / 20_000
    encode_token_s: float = 1 / 40_000
    fetch_byte_s: float = 1 / 20e9
    fetch_base_s: float = 0.5e-3


class Candidate(msgspec.Struct, frozen=True):
    """A prefill worker as the ingress sees it. ``queued_tokens`` are active tokens waiting or running there,
    including those that the ingress has sent since the last heartbeat. ``tokens_per_s`` (0: not measured yet) and
    ``read_bytes_per_s`` (by peer) are its own measurements."""

    worker_id: WorkerId
    name: str
    queued_tokens: int = 0
    tokens_per_s: float = 0.0
    read_bytes_per_s: dict[WorkerId, float] = {}
    draining: bool = False


class SpanDemand(msgspec.Struct, frozen=True):
    """A span as placement sees it. ``holders``: workers that announced its KV; ``recompute``: tokens a hit costs."""

    key: ContentKey
    tokens: int
    kv_bytes: int
    recompute: int
    holders: frozenset[WorkerId] = frozenset()
    encoded: bool = False  #: somebody holds the encoder output


class Demand(msgspec.Struct, frozen=True):
    text_tokens: int
    spans: tuple[SpanDemand, ...]
    reuse: bool  #: KV may be reused at any position


class Choice(msgspec.Struct, frozen=True):
    worker_id: WorkerId
    active_tokens: int  #: what the request is expected to cost there
    expected_s: float
    why: str


def active_tokens(demand: Demand) -> int:
    """Tokens the request computes if every announced KV object can be had."""
    spans = sum(s.recompute if demand.reuse and s.holders else s.tokens for s in demand.spans)
    return demand.text_tokens + spans


def expected_ttft(candidate: Candidate, demand: Demand, costs: Costs) -> tuple[float, str]:
    """Seconds until the first token if ``candidate`` takes the request, and the terms it is made of."""
    token_s = 1 / candidate.tokens_per_s if candidate.tokens_per_s > 0 else costs.token_s
    queue = candidate.queued_tokens * token_s
    compute = demand.text_tokens * token_s
    fetch = encode = 0.0
    seen: set[ContentKey] = set()
    for span in demand.spans:
        first = span.key not in seen
        seen.add(span.key)
        if demand.reuse and (span.holders or not first):
            compute += span.recompute * token_s
            if first and candidate.worker_id not in span.holders:
                fetch += _fetch_s(candidate, span, costs)
        else:
            compute += span.tokens * token_s
            if first and not span.encoded:
                encode += span.tokens * costs.encode_token_s
    total = queue + fetch + encode + compute
    parts = {"queue": queue, "fetch": fetch, "encode": encode, "compute": compute}
    why = " + ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in parts.items()) + " ms"
    return total, why


def _fetch_s(candidate: Candidate, span: SpanDemand, costs: Costs) -> float:
    """Seconds to read the span's KV from the best of its holders; a peer that cannot be read from (0 B/s) costs as much
    as computing the span again."""
    default = 1 / costs.fetch_byte_s
    best = max((candidate.read_bytes_per_s.get(holder, default) for holder in span.holders), default=0.0)
    if best <= 0:
        return span.tokens * (costs.token_s + costs.encode_token_s)
    return costs.fetch_base_s + span.kv_bytes / best


def choose(
    candidates: Sequence[Candidate],
    demand: Demand,
    costs: Costs,
    *,
    last_chosen: Mapping[WorkerId, int] | None = None,
    pin: str | None = None,
    exclude: Iterable[WorkerId] = (),
) -> Choice:
    """The candidate with the least expected time; equal ones take turns (``last_chosen``: worker -> turn number).

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
    turns = last_chosen or {}
    scored = [(expected_ttft(c, demand, costs), c) for c in usable]
    (seconds, why), best = min(scored, key=lambda s: (round(s[0][0], 4), turns.get(s[1].worker_id, -1), s[1].worker_id))
    return Choice(best.worker_id, active_tokens(demand), seconds, "pinned" if pin is not None else why)
