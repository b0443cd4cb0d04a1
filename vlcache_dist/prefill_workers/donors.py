"""Whose image KV others reuse, where it is not that of the first request: of the picture in one context that is the
same for everybody. Such KV is a function of the picture (and the model) alone: it carries nothing of anybody's prompt.

::

    canonical    the context is computed first, recorded, and reused at once by the request that waits for it
    background   the request is computed and records nothing; the context is computed when the engine has time
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from vlcache_dist import wire
from vlcache_dist.engine.api import EngineStats
from vlcache_dist.errors import VLCacheError
from vlcache_dist.node import Node
from vlcache_dist.prefill_workers import idle
from vlcache_dist.types import ContentKey, KVSource, ObjectKind, ReuseMode, SamplingParams, SpanReport

log = logging.getLogger(__name__)
MAX_PENDING = 32  #: pictures; the oldest is forgotten for a newer one
TIMEOUT_S = 60.0


def is_donor(donor: wire.DonorContext, generation: wire.Generation, index: int) -> bool:
    """Whether span ``index`` of a prompt stands in the donors' context."""
    span = generation.spans[index]
    return span.start == len(donor.before) and generation.token_ids[: span.start] == donor.before


class Donors:
    """Belongs to the worker's event loop. ``record`` runs a request for the KV that it records; ``run`` is to be
    spawned."""

    def __init__(
        self, node: Node, stats: Callable[[], EngineStats], record: Callable[[wire.Prefill], Awaitable[None]]
    ) -> None:
        self._node = node
        self._stats = stats
        self._record = record
        self._pending: OrderedDict[ContentKey, tuple[wire.Prefill, float]] = OrderedDict()
        self._arrived = asyncio.Event()
        self._counts: Counter[str] = Counter()

    async def ahead(self, message: wire.Prefill) -> None:
        """Record what a request shows and nobody has, all at the same time. What fails is left to the request."""
        generation = message.generation
        if generation.reuse is not ReuseMode.APPROX:
            return
        known = {state.key: state for state in message.hints}
        wanted: dict[ContentKey, int] = {}
        for index, span in enumerate(generation.spans):
            if not is_donor(_context(message), generation, index) and not _exists(known.get(span.key)):
                wanted.setdefault(span.key, index)
        orders = [self._order(message, index) for index in wanted.values()]
        await asyncio.gather(*(self._carry_out(order, message.timeout_s / 2) for order in orders))

    def note(self, message: wire.Prefill, reports: Sequence[SpanReport]) -> None:
        """A request was answered: what it computed is worth recording when there is time."""
        if message.generation.reuse is ReuseMode.OFF:
            return
        for index, (span, report) in enumerate(zip(message.generation.spans, reports, strict=True)):
            if report.source is not KVSource.COMPUTED or is_donor(_context(message), message.generation, index):
                continue
            self._pending[span.key] = self._order(message, index), time.monotonic()
            self._pending.move_to_end(span.key)
            if len(self._pending) > MAX_PENDING:
                self._pending.popitem(last=False)
                self._counts["skipped"] += 1
            self._arrived.set()

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._pending:
                _, since = next(iter(self._pending.values()))
                if not idle.may_begin(self._stats(), since):
                    await asyncio.sleep(idle.POLL_S)
                    continue
                _, (order, _) = self._pending.popitem(last=False)
                await self._carry_out(order, TIMEOUT_S)

    def _order(self, message: wire.Prefill, index: int) -> wire.Prefill:
        """The request that records span ``index`` of ``message``: the picture in the donors' context, one token."""
        asked, donor = message.generation, _context(message)
        span = asked.spans[index]
        generation = msgspec.structs.replace(
            asked,
            request_id=f"{asked.request_id}~donor{index}",
            token_ids=(*donor.before, *asked.token_ids[span.start : span.end], *donor.after),
            spans=(msgspec.structs.replace(span, start=len(donor.before)),),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True),
            reuse=ReuseMode.EXACT,
            num_generated=0,
        )
        return msgspec.structs.replace(message, generation=generation, hints=())

    async def _carry_out(self, order: wire.Prefill, timeout_s: float) -> None:
        (span,) = order.generation.spans
        try:
            if self._node.store.lookup(ObjectKind.KV, span.key) is None and not _exists(
                await self._node.state(span.key)
            ):
                await self._record(msgspec.structs.replace(order, timeout_s=timeout_s))
                self._counts["recorded"] += 1
        except VLCacheError as error:  # its encoder output may be gone, or the store full
            log.info("KV of %s was not recorded for others: %s", span.key.hex()[:16], error)
            self._counts["skipped"] += 1

    def status(self) -> dict[str, Any]:
        return {"pending": len(self._pending), **{name: self._counts[name] for name in ("recorded", "skipped")}}


def _context(message: wire.Prefill) -> wire.DonorContext:
    assert message.donor is not None
    return message.donor


def _exists(state: wire.KeyState | None) -> bool:
    """Somebody has the KV, or is computing it."""
    return state is not None and bool(state.kv or state.producer)
