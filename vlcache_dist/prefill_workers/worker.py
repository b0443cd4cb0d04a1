"""The prefill worker: prompts in, first tokens out, KV parked until a decode worker has taken it. In the colocated
role it decodes as well: prefill and decode share one engine and its pages, and nothing is handed over.

Plain Python over a ``Node`` and an ``Engine``; the Ray actor around it is in ``actor.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import msgspec

from vlcache_dist import wire
from vlcache_dist.engine.api import Admitted, Event, Export, Mode, PrefillDone, RecordDropped, SpanRecorded, TokenEvent
from vlcache_dist.engine.bridge import EngineBridge, next_tokens
from vlcache_dist.engine.engine import Engine
from vlcache_dist.engine.warmup import warm_up
from vlcache_dist.errors import DeadlineExceeded, EngineError, StoreFull, WorkerLost
from vlcache_dist.node import Node
from vlcache_dist.prefill_workers.donors import Donors
from vlcache_dist.prefill_workers.guard_books import GuardBooks
from vlcache_dist.prefill_workers.production import LocalProduction
from vlcache_dist.prefill_workers.resolver import SpanResolver
from vlcache_dist.prefill_workers.shadow import Shadows, Watch
from vlcache_dist.prefill_workers.speed import PassSpeed
from vlcache_dist.reuse.guard import Guard
from vlcache_dist.rpc import Call
from vlcache_dist.types import ObjectKind, ReuseMode, Role

log = logging.getLogger(__name__)
EXPORT_PATIENCE_S, EXPORT_PAUSE_S = 5.0, 0.02  #: with a store that is full of other handoffs


@dataclass(slots=True)
class _Parked:
    """A prefilled sequence that waits for its decode worker; ``expires`` on the loop's clock."""

    request_id: str
    lease: wire.Lease | None
    expires: float


class PrefillWorker:
    """Owns the engine. A parked sequence is freed by ``ReleaseHandoff``, or when its request's time is over."""

    def __init__(self, node: Node, engine: Engine, guard: Guard | None = None) -> None:
        self.node = node
        self.engine = engine
        self._bridge = EngineBridge(engine, self._stray, name=f"{node.name}-engine")
        self._production = LocalProduction()
        self.shadows = Shadows(node, self._bridge, engine, guard or Guard(owner=node.worker_id))
        self._books = GuardBooks(node, self.shadows.guard)
        self.donors = Donors(node, lambda: engine.stats(), self._record)
        self._resolvers: dict[str, SpanResolver] = {}
        self._parked: dict[str, _Parked] = {}
        self._speed = PassSpeed()
        self._started = asyncio.Event()
        node.handle(wire.Prefill, self.prefill)
        node.handle(wire.ReleaseHandoff, self.release_handoff)
        node.on_load(self.load)
        node.on_status(self.status)
        node.on_health(lambda: self._bridge.healthy)

    async def start(self) -> None:
        await asyncio.to_thread(warm_up, self.engine, decodes=self.node.role is Role.COLOCATED)
        self._bridge.start()
        await self.node.start()
        await self._books.exchange()  # a worker that comes back is as careful as the others
        self._started.set()
        self.node.spawn(self._books.run())
        self.node.spawn(self._expire_parked())
        self.node.spawn(self.shadows.run())
        self.node.spawn(self.donors.run())

    async def close(self) -> None:
        await self.node.close()
        await self._bridge.close()

    def load(self) -> wire.WorkerLoad:
        stats = self.engine.stats()
        self._speed.observe(stats.steps, stats.layer_rows[0], self._bridge.busy_s)
        return wire.WorkerLoad(
            running=stats.running,
            waiting=stats.waiting,
            waiting_tokens=stats.waiting_tokens,
            kv_blocks_free=stats.blocks_free,
            kv_blocks_total=stats.blocks_total,
            pass_s=self._speed.pass_s,
            token_s=self._speed.token_s,
        )

    async def status(self) -> dict[str, object]:
        stats = await self._bridge.call(lambda engine: engine.stats())
        return {
            "engine": msgspec.to_builtins(stats),
            "kv_bytes": self.engine.runner.pages.nbytes,
            "graphs": msgspec.to_builtins(self.engine.runner.graph_report()),
            "parked": len(self._parked),
            "producing": len(self._production),
            "guard": self.shadows.status(),
            "donors": self.donors.status(),
            "pass_s": self._speed.pass_s,
            "token_s": self._speed.token_s,
        }

    async def prefill(self, message: wire.Prefill, call: Call) -> AsyncIterator[wire.Prefilled | wire.Tokens]:
        """Handler of ``wire.Prefill``. Leaving it early (cancel, deadline, error) frees everything it held."""
        started = asyncio.get_running_loop().time()
        await self._started.wait()
        if message.donor is not None and message.donor.ahead:
            await self.donors.ahead(message)
        mode = Mode.GENERATE if self.node.role is Role.COLOCATED else Mode.PREFILL
        async with contextlib.aclosing(self._serve(message, mode, started)) as replies:
            async for reply in replies:
                if message.donor is not None and isinstance(reply, wire.Prefilled):
                    self.donors.note(message, reply.reports)
                yield reply

    async def _record(self, message: wire.Prefill) -> None:
        """Run a request for the KV that it records."""
        started = asyncio.get_running_loop().time()
        async with contextlib.aclosing(self._serve(message, Mode.RECORD, started)) as replies:
            async for _ in replies:
                pass

    async def _serve(
        self, message: wire.Prefill, mode: Mode, started: float
    ) -> AsyncGenerator[wire.Prefilled | wire.Tokens, None]:
        watch = self.shadows.begin(message.generation)
        generation = watch.generation
        request_id = generation.request_id
        loop = asyncio.get_running_loop()
        deadline = started + message.timeout_s
        resolver = SpanResolver(
            self.node,
            self._production,
            self._bridge.call,
            self.node.encoders,
            msgspec.structs.replace(message, generation=generation),
            time.monotonic() + deadline - loop.time(),
            self.shadows.advisor(watch),
        )
        queue = self._bridge.open(request_id)
        self._resolvers[request_id] = resolver
        resolving: asyncio.Task[None] | None = None
        done: PrefillDone | None = None
        finished = False
        try:
            if self.engine.stats().waiting == 0:
                await resolver.head_start()
            await self._bridge.call(lambda engine: engine.add(generation, time.monotonic(), mode))
            while True:
                event = await self._next(queue, deadline, resolving)
                if isinstance(event, Admitted):
                    resolving = asyncio.create_task(resolver.run(event.needed))
                elif isinstance(event, SpanRecorded | RecordDropped):
                    self._settle(event, resolver)
                elif isinstance(event, PrefillDone):
                    done = event
                elif isinstance(event, TokenEvent):
                    if done is None:
                        raise EngineError("a token came before its prefill was done")
                    took_s = loop.time() - started
                    self.shadows.first_token(watch, done, event)
                    handoff = None
                    if event.finish is None and mode is Mode.PREFILL:
                        handoff = await self._park(request_id, deadline)
                    finished = handoff is not None or event.finish is not None
                    yield self._prefilled(event, done, handoff, took_s, watch)
                    while not finished:
                        tokens = await next_tokens(queue, deadline)
                        finished = tokens.finish is not None
                        yield watch.as_asked(tokens)
                    return
        finally:
            await self.node.complete(self._clean_up(generation, resolver, resolving, finished))

    async def _clean_up(
        self,
        generation: wire.Generation,
        resolver: SpanResolver,
        resolving: asyncio.Task[None] | None,
        finished: bool,
    ) -> None:
        """In this order: nothing is provided any more; the engine frees what it holds; what it recorded before that is
        announced; and only then are the claims that are left given up, which wakes those who wait for them."""
        request_id = generation.request_id
        if resolving is not None:
            resolving.cancel()
            await asyncio.gather(resolving, return_exceptions=True)
        await resolver.stop()
        if not finished:
            await self._abort(request_id)
        self._bridge.shut(request_id)
        del self._resolvers[request_id]
        resolver.close()
        if generation.reuse is ReuseMode.OFF:
            self._discard_private(generation)

    async def release_handoff(self, message: wire.ReleaseHandoff, call: Call) -> wire.Ok:
        """Handler of ``wire.ReleaseHandoff``; an unknown ticket is fine (it expired, or was released before)."""
        await self._release(message.ticket)
        return wire.Ok()

    @staticmethod
    async def _next(queue: asyncio.Queue[Event], deadline: float, resolving: asyncio.Task[None] | None) -> Event:
        """The next event, or the resolver's error if that comes first."""
        if resolving is None or resolving.done():
            if resolving is not None:
                resolving.result()
            return await EngineBridge.next_event(queue, deadline)
        coming = asyncio.create_task(EngineBridge.next_event(queue, deadline))
        try:
            await asyncio.wait({coming, resolving}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                resolving.result()
            return await coming
        finally:
            coming.cancel()

    async def _park(self, request_id: str, deadline: float) -> wire.Handoff:
        export = await self._export(request_id, deadline)
        remaining = deadline - asyncio.get_running_loop().time()
        if remaining <= 0:
            raise DeadlineExceeded("the request's time was over before it could be handed over")
        lease = self.node.lease(export.staging, remaining) if export.staging is not None else None
        self._parked[request_id] = _Parked(request_id, lease, deadline)
        return wire.Handoff(
            worker_id=self.node.worker_id,
            address=self.node.address,
            ticket=request_id,
            num_tokens=export.num_tokens,
            rows=export.rows,
            spans=tuple(wire.HandoffSpan(span.index, span.key, span.variant) for span in export.spans),
            staging=lease,
        )

    async def _export(self, request_id: str, deadline: float) -> Export:
        """Pack the rows to hand over. A full store is waited for: other handoffs end soon. Raises StoreFull."""
        loop = asyncio.get_running_loop()
        give_up = min(deadline, loop.time() + EXPORT_PATIENCE_S)
        while True:
            try:
                return await self._bridge.call(lambda engine: engine.export(request_id, time.monotonic()))
            except StoreFull:
                if loop.time() + EXPORT_PAUSE_S > give_up:
                    raise
            await asyncio.sleep(EXPORT_PAUSE_S)

    async def _release(self, ticket: str) -> None:
        if self._unpark(ticket):
            await self._bridge.call(lambda engine: engine.release(ticket))

    async def _abort(self, request_id: str) -> None:
        self._unpark(request_id)
        with contextlib.suppress(WorkerLost):  # an engine that has stopped holds nothing back
            await self._bridge.call(lambda engine: engine.abort(request_id))

    def _unpark(self, ticket: str) -> bool:
        """Take a ticket and its lease back; False if there is none."""
        parked = self._parked.pop(ticket, None)
        if parked is not None and parked.lease is not None:
            self.node.store.release(parked.lease.lease_id, parked.lease.generation, time.monotonic())
        return parked is not None

    async def _expire_parked(self) -> None:
        """Free what nobody came for: the ingress or the decode worker died."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1.0)
            for ticket in [t for t, parked in self._parked.items() if parked.expires <= loop.time()]:
                log.warning("nobody took over %s in time; its KV is freed", ticket)
                with contextlib.suppress(WorkerLost):
                    await self._release(ticket)

    def _discard_private(self, generation: wire.Generation) -> None:
        """What ``reuse=off`` computed serves nobody else."""
        for span in generation.spans:
            extent = self.node.store.lookup(ObjectKind.EMBEDDING, span.key)
            if extent is not None:
                self.node.store.discard(extent)

    @staticmethod
    def _prefilled(
        token: TokenEvent, done: PrefillDone, handoff: wire.Handoff | None, took_s: float, watch: Watch
    ) -> wire.Prefilled:
        return wire.Prefilled(
            token_id=token.token_id,
            logprobs=watch.wanted(token.logprobs),
            finish=token.finish,
            reports=done.reports,
            cached_tokens=done.cached_tokens,
            handoff=handoff,
            queue_ms=done.queue_s * 1e3,
            compute_ms=(took_s - done.queue_s) * 1e3,
            plan=watch.changed_plan,
            guard=watch.level.name.lower(),
        )

    def _settle(self, event: SpanRecorded | RecordDropped, resolver: SpanResolver | None) -> None:
        if isinstance(event, SpanRecorded):
            key = event.extent.key
            self.node.announce(event.extent)
        else:
            key = event.key
            self.node.unclaim(ObjectKind.KV, key)
        if resolver is not None:
            resolver.settle(key)

    def _stray(self, event: Event) -> None:
        """What was recorded when its request ended is announced; a record dropped then was given up with its claim."""
        if isinstance(event, SpanRecorded):
            self._settle(event, self._resolvers.get(event.request_id))
