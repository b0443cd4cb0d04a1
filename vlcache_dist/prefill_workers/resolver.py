"""Where one request's image KV comes from: every span is given a source, in prompt order.

::

    own store ─> a holder elsewhere (lease, READ, validate) ─> claim the key (single flight), compute, record, announce
                                                              └─ somebody else computes it: wait, then start over

Whatever fails falls one rung down, KV -> encoder output -> encoding again, and never to a wrong answer. A request
that holds a claim never waits for another producer before its own claims are settled, so two requests with the same
images in opposite order cannot wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

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
from vlcache_dist.prefill_workers.production import LocalProduction
from vlcache_dist.reuse.context import Advice, signature, variant_in
from vlcache_dist.reuse.plan import Guarded, Plan
from vlcache_dist.types import ContentKey, KVSource, MediaSpan, ObjectKind, ReuseMode, Variant

log = logging.getLogger(__name__)
ENCODE_ATTEMPTS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.2  #: between attempts to find room
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
        self._plan = Plan.parse(message.generation.plan)
        self._deadline = deadline
        self._advise = advise
        self._claims: set[ContentKey] = set()
        self._settled = asyncio.Event()
        self._settled.set()

    async def run(self, needed: Sequence[int]) -> None:
        """Resolve the spans ``needed``, in order. Raises the error that ends the request."""
        for index in needed:
            source = await self._resolve(index, self._generation.spans[index])
            # From here on the source is the engine's to give back, whatever becomes of this task.
            await asyncio.shield(asyncio.ensure_future(self._provide(index, source)))

    async def _provide(self, index: int, source: Compute | Reuse) -> None:
        try:
            await self._on_engine(lambda engine: engine.provide(self._generation.request_id, index, source))
        except BaseException:  # nothing was taken over
            self._give_back(source)
            raise

    def _give_back(self, source: Compute | Reuse) -> None:
        store = self._node.store
        for extent in (source.embedding, source.kv if isinstance(source, Reuse) else None):
            if extent is not None:
                store.unpin(extent)
                if extent.kind is ObjectKind.STAGING:
                    store.discard(extent)
        if isinstance(source, Compute) and source.record is not None:
            store.abort(source.record)
            self._give_up(source.record.key)

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

    async def _resolve(self, index: int, span: MediaSpan) -> Compute | Reuse:
        if self._generation.reuse is ReuseMode.OFF:
            return Compute(await self._embedding(span))
        allowed = await self._on_engine(lambda engine: engine.recordable(self._generation.request_id, index))
        if self._generation.reuse is ReuseMode.EXACT or self._plan.is_full(span.length, self._node.layout.num_layers):
            record = self._record_extent(index, span) if allowed and await self._claim(span.key) else None
            return await self._compute(span, record)
        tried: set[bytes] = set()
        while True:
            if (source := await self._from_stores(index, span, tried)) is not None:
                return source
            if allowed and await self._claim(span.key):
                return await self._compute(span, self._record_extent(index, span))
            if not await self._wait_for_producer(span.key, tried):
                return await self._compute(span, None)

    async def _compute(self, span: MediaSpan, record: Extent | None, *, remembered: bool = False) -> Compute:
        try:
            return Compute(await self._embedding(span), record, remembered)
        except BaseException:
            if record is not None:
                self._node.store.abort(record)
                self._give_up(span.key)
            raise

    async def _from_stores(self, index: int, span: MediaSpan, tried: set[bytes]) -> Compute | Reuse | None:
        """KV from the own store or from any announced holder that was not tried in vain; encoder output where the KV
        is remembered to be harmful in this context."""
        if (kv := self._node.store.lookup(ObjectKind.KV, span.key, pin=True)) is not None:
            advice = self._advise(index, kv.variant)
            if advice is Advice.COMPUTE:
                self._node.store.unpin(kv)
                return await self._compute(span, None, remembered=True)
            return await self._reuse(span, kv, advice, KVSource.LOCAL)
        for holder in await self._node.holders(ObjectKind.KV, span.key):
            if holder.worker_id == self._node.worker_id or self._attempt(holder) in tried:
                continue
            tried.add(self._attempt(holder))
            advice = self._advise(index, holder.variant)
            if advice is Advice.COMPUTE:
                return await self._compute(span, None, remembered=True)
            try:
                kv = await self._node.fetch(holder, ObjectKind.KV, span)
            except VLCacheError as error:
                log.warning("KV of %s not had from %s: %s", span.key.hex()[:16], holder.worker_id, error)
                continue
            return await self._reuse(span, kv, advice, KVSource.REMOTE, holder.worker_id)
        return None

    async def _reuse(self, span: MediaSpan, kv: Extent, advice: Advice, source: KVSource, holder: str = "") -> Reuse:
        """A source from a pinned KV object, with the encoder output of the rows to recompute."""
        moved = kv.elements * self._node.layout.itemsize if source is KVSource.REMOTE else 0
        trusted = advice is Advice.TRUST and isinstance(self._plan, Guarded)
        plan = self._plan.base if isinstance(self._plan, Guarded) and trusted else self._plan
        embedding = None
        try:
            depths = plan.depths(span.length, self._node.layout.num_layers)
            recomputed = np.flatnonzero(depths)
            if len(recomputed):
                # A canary may ask for the whole span.
                rows = span.length if plan.canary is not None else int(recomputed[-1]) + 1
                embedding = await self._embedding(span, rows)
        except BaseException:
            self._node.store.unpin(kv)
            raise
        return Reuse(kv, depths, embedding, source, moved, holder, plan.canary, trusted)

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

    async def _embedding(self, span: MediaSpan, rows: int | None = None) -> Extent:
        """The span's encoder output (its first ``rows`` rows at least), pinned. While a store is full of what running
        requests hold, this waits for them."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await self._embedding_now(span, rows)
            except StoreFull as error:
                if time.monotonic() + pause > self._deadline:
                    raise Overloaded(f"no room for item {span.index}: {error}") from error
            await self._on_engine(lambda engine: engine.relieve())
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _embedding_now(self, span: MediaSpan, rows: int | None) -> Extent:
        """From the own store, a holder, or an encoder. Raises StoreFull if lack of room was all that was wrong."""
        if (extent := self._node.store.lookup(ObjectKind.EMBEDDING, span.key, pin=True)) is not None:
            return extent
        failures: list[VLCacheError] = []
        if self._generation.reuse is not ReuseMode.OFF:
            for holder in await self._node.holders(ObjectKind.EMBEDDING, span.key):
                if holder.worker_id == self._node.worker_id:
                    continue
                try:
                    return await self._node.fetch(holder, ObjectKind.EMBEDDING, span, rows=rows)
                except StoreFull:
                    raise
                except VLCacheError as error:
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
