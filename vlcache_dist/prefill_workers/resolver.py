"""Where one request's image KV comes from: every span is given a source, in prompt order.

::

    own store ─> a holder elsewhere (lease, READ, validate) ─> claim the key (single flight), compute, record, announce
                  └ the engine starts with the first layers    └─ somebody else computes it: wait, then start over

Whatever fails falls one rung down, KV -> encoder output -> encoding again, and never to a wrong answer. A request
that holds a claim never waits for another producer before its own claims are settled, so two requests with the same
images in opposite order cannot wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from vlcache_dist import wire
from vlcache_dist.engine.api import Compute, Reuse
from vlcache_dist.engine.bridge import OnEngine
from vlcache_dist.errors import (
    BadRequest,
    CacheError,
    DeadlineExceeded,
    EngineError,
    ObjectGone,
    Overloaded,
    ProtocolError,
    StoreFull,
    VLCacheError,
    WorkerLost,
)
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.node import Node
from vlcache_dist.prefill_workers.arrival import Arrival, Incoming
from vlcache_dist.prefill_workers.donors import is_donor
from vlcache_dist.prefill_workers.production import LocalProduction
from vlcache_dist.reuse.context import Advice, signature, variant_in
from vlcache_dist.reuse.plan import Guarded, Plan
from vlcache_dist.transfer.fetch import OnExtent, OnGroup
from vlcache_dist.types import ContentKey, KVSource, MediaSpan, ObjectKind, ReuseMode, Variant

log = logging.getLogger(__name__)
ENCODE_ATTEMPTS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.2  #: between attempts to find room
ASKING = 4  #: turns of the loop from ``head_start`` to the holder's socket: heading, fetch, flight, call
MIN_PATIENCE_S = 0.5  #: with less time left than twice this, a request computes rather than waits

Advise = Callable[[int, Variant], Advice]  #: what is remembered of an object's context beside that of span number ...


class SpanResolver:
    """One request's. ``on_engine`` runs a function in the engine's thread; ``encoders`` lists the living encoder
    workers' addresses, the preferred one for a key first; ``deadline`` is on the monotonic clock; ``advise`` is asked
    about every object before it is read or reused."""

    def __init__(
        self,
        node: Node,
        production: LocalProduction,
        on_engine: OnEngine,
        encoders: Callable[[ContentKey], Sequence[str]],
        message: wire.Prefill,
        deadline: float,
        advise: Advise = lambda index, variant: Advice.WATCH,
    ) -> None:
        self._node = node
        self._production = production
        self._on_engine = on_engine
        self._encoders = encoders
        self._generation = message.generation
        self._source = message.source
        self._donor = message.donor
        self._hints = {state.key: state for state in message.hints}
        self._plan = Plan.parse(message.generation.plan)
        self._deadline = deadline
        self._advise = advise
        self._advice: dict[tuple[int, Variant], Advice] = {}  # asked once: asking counts
        self._claims: set[ContentKey] = set()
        self._settled = asyncio.Event()
        self._settled.set()
        self._open: set[int] = set()  # spans without a source, or whose source is still arriving
        self._known: dict[tuple[ObjectKind, ContentKey], tuple[wire.Holder, ...]] = {}  # each used once
        self._ahead: dict[ContentKey, Arrival] = {}
        self._heading: asyncio.Task[None] | None = None

    async def head_start(self) -> None:
        """Begin to fetch what other workers hold, while the engine admits the request. A span that turns out to lie in
        the prefix cache is fetched in vain. Holders that the ingress named are asked before the engine's thread is
        woken, which would have the interpreter for itself for most of the round trip."""
        if self._generation.reuse is ReuseMode.APPROX:
            self._heading = asyncio.create_task(self._head_start())
            for _ in range(ASKING if self._hints else 0):
                await asyncio.sleep(0)

    async def stop(self) -> None:
        """End what was begun and is not used; nothing is begun afterwards. Idempotent."""
        heading, ahead = self._heading, list(self._ahead.values())
        if heading is not None:
            heading.cancel()  # it orders without a pause behind its last wait: what it has not ordered, it never will
        self._ahead.clear()
        for arrival in ahead:
            arrival.drop()
        if heading is not None:
            await asyncio.gather(heading, return_exceptions=True)
        for arrival in ahead:
            await arrival.close()

    async def _head_start(self) -> None:
        missing: dict[ContentKey, tuple[int, MediaSpan]] = {}
        for index, span in enumerate(self._generation.spans):
            if self._plan.is_full(span.length, self._node.layout.num_layers):
                continue
            if self._node.store.lookup(ObjectKind.KV, span.key) is None:
                missing.setdefault(span.key, (index, span))
        if not missing:
            return
        unknown = [key for key in missing if key not in self._hints]
        fresh = {state.key: state for state in await self._node.lookup(unknown)} if unknown else {}
        for key, (index, span) in missing.items():
            for kind in (ObjectKind.KV, ObjectKind.EMBEDDING):
                holders = self._node.holders_in(fresh.get(key) or self._hints[key], kind)
                if holders or key in fresh:  # what the ingress did not know may have come up since
                    self._known[kind, key] = holders
            others = [h for h in self._known.get((ObjectKind.KV, key), ()) if h.worker_id != self._node.worker_id]
            if others and self._advised(index, others[0].variant) is not Advice.COMPUTE:
                self._ahead[key] = self._order(span, others[0])

    async def _holders(self, kind: ObjectKind, key: ContentKey) -> tuple[wire.Holder, ...]:
        """As the ingress knew them, then as the directory knows them now."""
        known = self._known.pop((kind, key), None)
        return await self._node.holders(kind, key) if known is None else known

    async def run(self, needed: Sequence[int]) -> None:
        """Resolve the spans ``needed``, in order; what arrives meanwhile is followed to its end. Raises the error that
        ends the request."""
        self._open = set(needed)
        following: list[asyncio.Task[None]] = []
        arrivals: list[Arrival] = []
        try:
            for index in needed:
                tried: set[bytes] = set()
                arrival = await self._place(index, tried)
                if arrival is not None:
                    arrivals.append(arrival)
                    following.append(asyncio.create_task(self._follow(index, arrival, tried)))
            await self.stop()
            await asyncio.gather(*following)
        finally:
            for task in following:
                task.cancel()
            for arrival in arrivals:
                arrival.drop()  # a task that is cancelled before its first step does not get to that
            await asyncio.gather(*following, return_exceptions=True)

    async def _place(self, index: int, tried: set[bytes]) -> Arrival | None:
        """Give the engine a source for the span; if it is still arriving, returns what must be followed."""
        source, arrival = await self._resolve(index, self._generation.spans[index], tried)
        try:
            # From here on the source is the engine's to give back, whatever becomes of this task.
            await asyncio.shield(asyncio.ensure_future(self._provide(index, source)))
        except BaseException:
            if arrival is not None:
                await arrival.close()
            raise
        if arrival is None:
            self._open.discard(index)
        return arrival

    async def _follow(self, index: int, arrival: Arrival | None, tried: set[bytes]) -> None:
        """Until the engine has a source that is all there: what arrives in vain is replaced."""
        while arrival is not None:
            try:
                error = await arrival.follow(self._on_engine, self._generation.request_id, index)
            finally:
                await arrival.close()
            if error is None:
                self._open.discard(index)
                return
            log.warning("KV of item %d did not arrive from %s: %s", index, arrival.holder.worker_id, error)
            arrival = await self._place(index, tried)

    async def _provide(self, index: int, source: Compute | Reuse) -> None:
        try:
            await self._on_engine(lambda engine: engine.provide(self._generation.request_id, index, source))
        except BaseException:  # nothing was taken over
            self._give_back(source)
            raise

    def _give_back(self, source: Compute | Reuse) -> None:
        store = self._node.store
        kv = source.kv if isinstance(source, Reuse) and not source.groups else None
        embedding = None if isinstance(source, Reuse) and source.rows_arrive else source.embedding
        for extent in (embedding, kv):
            if extent is not None:
                self._let_go(extent)
        if isinstance(source, Compute) and source.record is not None:
            store.abort(source.record)
            self._give_up(source.record.key)

    def _let_go(self, extent: Extent) -> None:
        self._node.store.unpin(extent)
        if extent.kind is ObjectKind.STAGING:
            self._node.store.discard(extent)

    def settle(self, key: ContentKey) -> None:
        """The engine recorded the span, or dropped the record: this request's claim on ``key`` is over."""
        if key in self._claims:
            self._claims.discard(key)
            self._production.end(key)
        if not self._claims:
            self._settled.set()

    def close(self) -> None:
        """Give up every claim that is left (the request is over)."""
        for key in list(self._claims):
            self._give_up(key)

    # -- one span -----------------------------------------------------------------------------------------------

    async def _resolve(self, index: int, span: MediaSpan, tried: set[bytes]) -> tuple[Compute | Reuse, Arrival | None]:
        """A source; and if it is still arriving, its arrival. ``tried``: attempts that were in vain."""
        if self._generation.reuse is ReuseMode.OFF:
            return Compute(await self._embedding(span)), None
        approx = self._generation.reuse is ReuseMode.APPROX
        reusable = approx and not self._plan.is_full(span.length, self._node.layout.num_layers)
        if reusable and (found := await self._from_stores(index, span, tried)) is not None:
            return found  # without another word to the engine: the bytes may be on their way
        allowed = self._is_donor(index) and await self._on_engine(
            lambda engine: engine.recordable(self._generation.request_id, index)
        )
        if not reusable:
            record = self._record_extent(index, span) if allowed and await self._claim(span.key) else None
            return await self._compute(span, record), None
        # What was withdrawn behind a span that is open itself claims nothing: that one may wait for a producer.
        allowed = allowed and min(self._open, default=index) == index
        while True:
            if allowed and await self._claim(span.key):
                return await self._compute(span, self._record_extent(index, span)), None
            if not await self._wait_for_producer(span.key, tried):
                return await self._compute(span, None), None
            if (found := await self._from_stores(index, span, tried)) is not None:
                return found

    def _is_donor(self, index: int) -> bool:
        """Whether others may have this request's KV of span ``index``."""
        return self._donor is None or is_donor(self._donor, self._generation, index)

    async def _compute(self, span: MediaSpan, record: Extent | None, *, remembered: bool = False) -> Compute:
        try:
            return Compute(await self._embedding(span), record, remembered)
        except BaseException:
            if record is not None:
                self._node.store.abort(record)
                self._give_up(span.key)
            raise

    def _advised(self, index: int, variant: Variant) -> Advice:
        """What is remembered of an object's context beside that of span ``index``."""
        if (index, variant) not in self._advice:
            self._advice[index, variant] = self._advise(index, variant)
        return self._advice[index, variant]

    async def _from_stores(
        self, index: int, span: MediaSpan, tried: set[bytes]
    ) -> tuple[Compute | Reuse, Arrival | None] | None:
        """KV from the own store or from any announced holder that was not tried in vain; encoder output where the KV
        is remembered to be harmful in this context."""
        if self._heading is not None and not self._heading.done():
            await asyncio.wait({self._heading})
        # What was ordered for this request may be in the own store by now, but it came from elsewhere.
        if span.key in self._ahead and (
            found := await self._from_one(index, span, self._ahead[span.key].holder, tried)
        ):
            return found
        if (kv := self._node.store.lookup(ObjectKind.KV, span.key, pin=True)) is not None:
            advice = self._advised(index, kv.variant)
            if advice is Advice.COMPUTE:
                self._node.store.unpin(kv)
                return await self._compute(span, None, remembered=True), None
            try:
                return self._reuse(span, kv, await self._rows(span), advice), None
            except BaseException:
                self._node.store.unpin(kv)
                raise
        for holder in await self._holders(ObjectKind.KV, span.key):
            if holder.worker_id == self._node.worker_id or self._attempt(holder) in tried:
                continue
            if (found := await self._from_one(index, span, holder, tried)) is not None:
                return found
        return None

    async def _from_one(
        self, index: int, span: MediaSpan, holder: wire.Holder, tried: set[bytes]
    ) -> tuple[Compute | Reuse, Arrival | None] | None:
        """From one holder; encoder output if its KV is remembered to be harmful here; None if it does not deliver."""
        tried.add(self._attempt(holder))
        advice = self._advised(index, holder.variant)
        if advice is Advice.COMPUTE:
            return await self._compute(span, None, remembered=True), None
        return await self._from_holder(span, holder, advice)

    def _order(self, span: MediaSpan, holder: wire.Holder) -> Arrival:
        """Begin to fetch a span's KV, and at the same time the encoder output of the rows to recompute."""
        node = self._node

        def fetch(on_group: OnGroup, on_extent: OnExtent) -> Coroutine[Any, Any, Extent | None]:
            return node.fetch(holder, ObjectKind.KV, span, on_group=on_group, on_extent=on_extent)

        def rows(on_group: OnGroup, on_extent: OnExtent) -> Coroutine[Any, Any, Extent | None]:
            return self._rows(span, (on_group, on_extent))

        groups = node.layer_groups(holder, span)
        return Arrival(holder, groups, Incoming(fetch, self._let_go), Incoming(rows, self._let_go))

    async def _from_holder(
        self, span: MediaSpan, holder: wire.Holder, advice: Advice
    ) -> tuple[Reuse, Arrival | None] | None:
        """KV from elsewhere, as soon as it is on its way. None if the holder does not deliver."""
        if span.key in self._ahead and self._ahead[span.key].holder == holder:
            arrival = self._ahead.pop(span.key)
        else:
            arrival = self._order(span, holder)
        kv, rows = arrival.kv, arrival.rows
        streamed = whole = False
        try:
            await kv.begun()
            if kv.extent is not None:
                await rows.begun()
            try:
                embedding = await rows.valid() if rows.over else rows.extent
                if kv.over or kv.extent is None or not arrival.groups:
                    extent = await kv.valid()
                    embedding = await rows.valid()
                else:
                    extent, streamed = kv.extent, True
            except VLCacheError as error:
                if rows.over and rows.extent is None and kv.extent is not None:
                    raise  # no encoder output is to be had from anywhere
                log.warning("KV of %s not had from %s: %s", span.key.hex()[:16], holder.worker_id, error)
                return None
            assert extent is not None
            arriving = arrival.rows_arrive = streamed and not rows.over
            if not arriving:
                rows.take()
            if not streamed:
                kv.take()
                whole = True
                return self._reuse(span, extent, embedding, advice, holder.worker_id), None
            source = self._reuse(span, extent, embedding, advice, holder.worker_id)
            return replace(source, groups=arrival.groups, rows_arrive=arriving), arrival
        finally:
            if not (streamed or whole):  # both fetches are over: to wait here once more could lose what was taken
                await arrival.close()

    async def _rows(self, span: MediaSpan, watch: tuple[OnGroup, OnExtent] | None = None) -> Extent | None:
        """Encoder output of what the plan recomputes, pinned; None if that is nothing. ``watch``: ``_embedding``."""
        if self._plan.is_none(span.length, self._node.layout.num_layers):
            return None
        # A canary may ask for the whole span.
        leading = self._plan.counts(span.length, self._node.layout.num_layers)[0]
        rows = span.length if self._plan.canary is not None else leading
        return await self._embedding(span, rows, watch)

    def _reuse(self, span: MediaSpan, kv: Extent, embedding: Extent | None, advice: Advice, holder: str = "") -> Reuse:
        layout = self._node.layout
        trusted = advice is Advice.TRUST and isinstance(self._plan, Guarded)
        plan = self._plan.base if isinstance(self._plan, Guarded) and trusted else self._plan
        return Reuse(
            kv,
            plan.depths(span.length, layout.num_layers),
            embedding,
            KVSource.REMOTE if holder else KVSource.LOCAL,
            kv.elements * layout.itemsize * layout.tp_size if holder else 0,
            holder,
            plan.canary,
            trusted=trusted,
        )

    # -- single flight ------------------------------------------------------------------------------------------

    async def _claim(self, key: ContentKey) -> bool:
        """Try to become the one producer of the key's KV, in this worker and in the cluster."""
        if not self._production.begin(key):
            return False
        try:
            granted = (await self._node.claim(ObjectKind.KV, key)).granted
        except BaseException:  # the directory client gives a claim back whose granting it has not seen
            self._production.end(key)
            raise
        if not granted:
            self._production.end(key)
            return False
        self._claims.add(key)
        self._settled.clear()
        return True

    async def _wait_for_producer(self, key: ContentKey, tried: set[bytes]) -> bool:
        """Wait for whoever computes the KV now. True: look again. False: nobody does, or time is short."""
        patience = (self._deadline - time.monotonic()) / 2
        if patience < MIN_PATIENCE_S:
            return False
        if self._production.active(key):
            await self._settled.wait()
            await self._production.wait(key, patience)
            return True
        state = await self._node.state(key)
        if any(self._attempt(holder) not in tried for holder in state.kv if holder.worker_id != self._node.worker_id):
            return True
        if state.producer is None or state.producer == self._node.worker_id:
            return False
        await self._settled.wait()
        if state.kv:  # all tried in vain: the directory would answer at once, again and again
            await asyncio.sleep(LONGEST_PAUSE_S)
        else:
            await self._node.await_key(ObjectKind.KV, key, patience)
        return True

    def _record_extent(self, index: int, span: MediaSpan) -> Extent | None:
        """Room to record a claimed span in; None (and the claim is given up) if there is none."""
        context = signature(self._generation.token_ids, self._generation.spans, index)
        try:
            return self._node.begin(ObjectKind.KV, span, variant_in(context))
        except CacheError as error:
            log.warning("no room to record %s: %s", span.key.hex()[:16], error)
            self._give_up(span.key)
            return None

    def _give_up(self, key: ContentKey) -> None:
        self._node.unclaim(ObjectKind.KV, key)
        self.settle(key)

    @staticmethod
    def _attempt(holder: wire.Holder) -> bytes:
        return holder.worker_id.encode() + holder.variant

    # -- encoder output -----------------------------------------------------------------------------------------

    async def _embedding(
        self, span: MediaSpan, rows: int | None = None, watch: tuple[OnGroup, OnExtent] | None = None
    ) -> Extent:
        """The span's encoder output (its first ``rows`` rows at least), pinned. While a store is full of what running
        requests hold, this waits for them. ``watch`` is told of the first fetch, as by ``Node.fetch``; if that fails
        after it was told of an extent, so does this."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await self._embedding_now(span, rows, watch)
            except StoreFull as error:
                if time.monotonic() + pause > self._deadline:
                    raise Overloaded(f"no room for item {span.index}: {error}") from error
            await self._on_engine(lambda engine: engine.relieve())
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _embedding_now(self, span: MediaSpan, rows: int | None, watch: tuple[OnGroup, OnExtent] | None) -> Extent:
        """From the own store, a holder, or an encoder. Raises StoreFull if lack of room was all that was wrong."""
        if (extent := self._node.store.lookup(ObjectKind.EMBEDDING, span.key, pin=True)) is not None:
            return extent
        failures: list[VLCacheError] = []
        if self._generation.reuse is not ReuseMode.OFF:
            for holder in await self._holders(ObjectKind.EMBEDDING, span.key):
                if holder.worker_id == self._node.worker_id:
                    continue
                begun: list[Extent] = []
                on_group, on_extent = None, None
                if watch is not None:
                    on_group, on_extent = watch[0], _both(begun.append, watch[1])
                try:
                    return await self._node.fetch(
                        holder, ObjectKind.EMBEDDING, span, rows=rows, on_group=on_group, on_extent=on_extent
                    )
                except StoreFull:
                    raise
                except VLCacheError as error:
                    if begun:
                        raise
                    failures.append(error)
        for address in list(self._encoders(span.key))[:ENCODE_ATTEMPTS]:
            for _ in range(ENCODE_ATTEMPTS):
                try:
                    return await self._encode(address, span, rows)
                except (BadRequest, DeadlineExceeded):
                    raise
                except VLCacheError as error:
                    failures.append(error)
                    if not isinstance(error, ObjectGone):  # evicted before it could be fetched: encode once more
                        break
        if failures and all(isinstance(error, EngineError) for error in failures):
            raise failures[-1]
        why = "; ".join(map(str, failures)) or "none is alive"
        log.warning("no encoder output of %s: %s", span.key.hex()[:16], why)
        if failures and isinstance(failures[-1], StoreFull):
            raise failures[-1]
        raise WorkerLost(f"no encoder could encode item {span.index} ({why})")

    async def _encode(self, address: str, span: MediaSpan, rows: int | None) -> Extent:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("no time is left to encode the pictures")
        private = self._generation.reuse is ReuseMode.OFF
        message = wire.Encode(span, self._source, timeout_s=remaining, private=private)
        reply = await self._node.client.call(address, message, timeout_s=remaining)
        if not isinstance(reply, wire.Encoded):
            raise ProtocolError(f"Encode was answered with {type(reply).__name__}")
        extent = await self._node.fetch(reply.holder, ObjectKind.EMBEDDING, span, rows=rows, private=private)
        if private:
            self._node.forget(address, ObjectKind.EMBEDDING, span.key)
        return extent


def _both(first: OnExtent, second: OnExtent) -> OnExtent:
    def tell(extent: Extent) -> None:
        first(extent)
        second(extent)

    return tell
