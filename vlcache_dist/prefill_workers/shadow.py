"""The guard at work: decides over each approximate request, runs shadows when the engine has time, keeps the books.

A shadow is the same prompt computed in full from the encoder's output, for one token, under keys that are nobody else's
(``reuse=off``: it reads no KV, fills no cache). It waits for its turn and its budget without holding anything; where
the pictures' encoder output is not at hand any more by then, it is skipped rather than paid for with another encoding.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from blake3 import blake3

from vlcache_dist.engine.api import Admitted, Compute, Mode, PrefillDone, TokenEvent
from vlcache_dist.engine.bridge import EngineBridge
from vlcache_dist.engine.engine import Engine
from vlcache_dist.errors import EngineError, VLCacheError
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.node import Node
from vlcache_dist.prefill_workers import idle
from vlcache_dist.reuse.books import Shadow
from vlcache_dist.reuse.context import Advice, ContextMemory, prompt_format, recorded_in, signature
from vlcache_dist.reuse.drift import ALTERNATIVES, first_token_drift
from vlcache_dist.reuse.guard import Guard
from vlcache_dist.reuse.ladder import Level, always_alarmed, plan_at
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.types import ContentKey, ObjectKind, ReuseMode, SamplingParams, TokenLogprobs, Variant
from vlcache_dist.wire import Generation, Tokens

log = logging.getLogger(__name__)
MAX_PENDING = 4  #: more would wait until their pictures are gone
TIMEOUT_S = 60.0


@dataclass(slots=True)
class Watch:
    """One request under the guard's eyes. ``generation``: as it is to be run; ``asked``: as it came. ``donors``: the
    variant that each span (by place) was reused from."""

    asked: Generation
    generation: Generation
    plan: Plan
    format: str = ""
    level: Level = Level.NORMAL
    sampled: bool = False
    donors: dict[int, Variant] | None = None

    @property
    def changed_plan(self) -> str:
        return self.generation.plan if self.generation.plan != self.asked.plan else ""

    def wanted(self, logprobs: TokenLogprobs | None) -> TokenLogprobs | None:
        """What the client asked for of a token's logprobs."""
        number = self.asked.sampling.logprobs
        if logprobs is None or number is None:
            return None
        return msgspec.structs.replace(logprobs, top=logprobs.top[:number])

    def as_asked(self, tokens: Tokens) -> Tokens:
        """Later tokens of a worker that decodes as well, with the logprobs that the client asked for."""
        if not self.sampled:
            return tokens
        kept = tuple(p for p in map(self.wanted, tokens.logprobs) if p is not None)
        return msgspec.structs.replace(tokens, logprobs=kept)


@dataclass(slots=True)
class _Pending:
    watch: Watch
    first: TokenLogprobs
    since: float


class Shadows:
    """Belongs to the worker's event loop. ``run`` is to be spawned."""

    def __init__(self, node: Node, bridge: EngineBridge, engine: Engine, guard: Guard) -> None:
        self.guard = guard
        self.memory = ContextMemory()
        self._node = node
        self._bridge = bridge
        self._engine = engine
        self._pending: deque[_Pending] = deque()
        self._arrived = asyncio.Event()
        self._counts: Counter[str] = Counter()
        self._busy_s = 0.0  # engine time that the budget knows of

    # -- requests -----------------------------------------------------------------------------------------------

    def begin(self, generation: Generation) -> Watch:
        """How a request is to be run. What is not approximate, or goes on behind a lost worker, is left alone."""
        plan = Plan.parse(generation.plan)
        watch = Watch(generation, generation, plan)
        if generation.reuse is not ReuseMode.APPROX or not generation.spans or generation.num_generated:
            return watch
        watch.donors = {}
        watch.format = prompt_format(generation.spans)
        decision = self.guard.decide(watch.format)
        watch.level, watch.sampled = decision.level, decision.sampled
        if watch.level is Level.OFF and not watch.sampled:
            watch.generation = msgspec.structs.replace(generation, reuse=ReuseMode.EXACT)
            return watch
        chosen = always_alarmed(plan) if watch.level is Level.OFF else plan_at(plan, watch.level)
        sampling = generation.sampling
        if watch.sampled:
            wanted = max(sampling.logprobs or 0, ALTERNATIVES)
            sampling = msgspec.structs.replace(sampling, logprobs=wanted)
        watch.generation = msgspec.structs.replace(generation, plan=str(chosen), sampling=sampling)
        return watch

    def advisor(self, watch: Watch) -> Callable[[int, Variant], Advice]:
        """For the request's resolver: what is remembered, if a canary would watch at all; notes who the donors are."""
        asked = watch.asked

        def advise(place: int, variant: Variant) -> Advice:
            if watch.donors is None or watch.plan.canary is None or watch.level is Level.OFF:
                return Advice.WATCH
            watch.donors[place] = variant
            here = signature(asked.token_ids, asked.spans, place)
            return self.memory.advise(asked.tenant, recorded_in(variant), here)

        return advise

    def first_token(self, watch: Watch, done: PrefillDone, token: TokenEvent) -> None:
        """Learn from a request's first token, and queue its shadow if it is to have one."""
        busy_s = self._bridge.busy_s
        self.guard.worked(busy_s - self._busy_s)
        self._busy_s = busy_s
        if watch.donors is None:
            return
        self._remember(watch, done, token)
        if not watch.sampled or token.logprobs is None:
            return
        if done.discarded is not None:
            before = done.discarded[1]
            if before is not None:  # the answer is the full one, and what reuse would have said is known
                kl, agrees = first_token_drift(token.logprobs, before)
                self.guard.observe(watch.format, watch.plan, Shadow(kl, agrees, True), watch.level)
                self._counts["in_line"] += 1
        elif any(report.reused_tokens for report in done.reports) and watch.level is not Level.OFF:
            self._queue(watch, token.logprobs)

    def _remember(self, watch: Watch, done: PrefillDone, token: TokenEvent) -> None:
        spans, tokens = watch.asked.spans, watch.asked.token_ids
        wrong = None if done.discarded is None else done.discarded[0] != token.token_id
        for place, variant in (watch.donors or {}).items():
            report = done.reports[place]
            if report.deviation is None:
                continue
            self.memory.observe(
                watch.asked.tenant,
                recorded_in(variant),
                signature(tokens, spans, place),
                alarmed=report.deviation > 1 and report.why != "rechecked",
                was_right=wrong,
            )

    def _queue(self, watch: Watch, first: TokenLogprobs) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._counts["skipped"] += 1
            return
        self._pending.append(_Pending(watch, first, time.monotonic()))
        self._arrived.set()

    # -- in the background --------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._pending:
                if not (self.guard.affords and idle.may_begin(self._engine.stats(), self._pending[0].since)):
                    await asyncio.sleep(idle.POLL_S)
                    continue
                await self._shadow(self._pending.popleft())

    async def _shadow(self, pending: _Pending) -> None:
        watch = pending.watch
        embeddings = self._pinned(watch)
        if embeddings is None:
            self._counts["skipped"] += 1
            return
        try:
            done, full = await self._full_run(watch, embeddings)
        except VLCacheError as error:
            log.warning("the shadow of %s failed: %s", watch.asked.request_id, error)
            self._counts["failed"] += 1
            return
        self.guard.spent(done.compute_s)
        kl, agrees = first_token_drift(full, pending.first)
        level = self.guard.observe(watch.format, watch.plan, Shadow(kl, agrees, False), watch.level)
        self._counts["runs"] += 1
        if level is not watch.level:
            log.warning("reuse in prompts of format %r is %s now", watch.format, level.name.lower())

    def _pinned(self, watch: Watch) -> list[Extent] | None:
        """The pictures' encoder output, all of it pinned; None if some is gone."""
        found: list[Extent] = []
        for span in watch.asked.spans:
            extent = self._node.store.lookup(ObjectKind.EMBEDDING, span.key, pin=True)
            if extent is None:
                self._unpin(found)
                return None
            found.append(extent)
        return found

    async def _full_run(self, watch: Watch, embeddings: list[Extent]) -> tuple[PrefillDone, TokenLogprobs]:
        """The prompt's first token when everything is computed. The engine takes over the pins as it asks for them."""
        request_id = f"{watch.asked.request_id}~shadow"
        generation = self._salted(watch.asked, request_id)
        queue = self._bridge.open(request_id)
        given = 0
        deadline = asyncio.get_running_loop().time() + TIMEOUT_S
        done: PrefillDone | None = None
        finished = False
        try:
            await self._bridge.call(lambda engine: engine.add(generation, time.monotonic(), Mode.PREFILL))
            while True:
                event = await EngineBridge.next_event(queue, deadline)
                if isinstance(event, Admitted):
                    for index in event.needed:
                        source = Compute(embeddings[index])
                        given = index + 1
                        try:
                            await asyncio.shield(self._provide(request_id, index, source))
                        except VLCacheError:  # nothing was taken over
                            given = index
                            raise
                elif isinstance(event, PrefillDone):
                    done = event
                elif isinstance(event, TokenEvent):
                    if done is None or event.logprobs is None:
                        raise EngineError(f"{request_id} drew a token out of turn, or without its alternatives")
                    finished = True
                    return done, event.logprobs
        finally:
            if not finished:
                await self._node.complete(self._abort(request_id))
            self._bridge.shut(request_id)
            self._unpin(embeddings[given:])

    async def _provide(self, request_id: str, index: int, source: Compute) -> None:
        await self._bridge.call(lambda engine: engine.provide(request_id, index, source))

    async def _abort(self, request_id: str) -> None:
        await self._bridge.call(lambda engine: engine.abort(request_id))

    @staticmethod
    def _salted(asked: Generation, request_id: str) -> Generation:
        def salted(key: ContentKey) -> ContentKey:
            return blake3(request_id.encode(), key=key).digest()

        return msgspec.structs.replace(
            asked,
            request_id=request_id,
            spans=tuple(msgspec.structs.replace(span, key=salted(span.key)) for span in asked.spans),
            sampling=SamplingParams(max_tokens=1, logprobs=ALTERNATIVES, ignore_eos=True),
            reuse=ReuseMode.OFF,
        )

    def _unpin(self, extents: list[Extent]) -> None:
        for extent in extents:
            self._node.store.unpin(extent)

    def status(self) -> dict[str, Any]:
        return {
            **self.guard.status(),
            "shadows": {name: self._counts[name] for name in ("runs", "in_line", "skipped", "failed")},
            "pending": len(self._pending),
            "contexts_remembered": len(self.memory),
        }
