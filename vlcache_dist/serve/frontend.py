"""A request's way through the pools, as the ingress steers it: media, keys, prompt, prefill, decode, text.

Plain Python over a ``FrontNode`` (rpc and directory); Ray Serve and FastAPI are around it. A worker that is lost
costs a retry elsewhere with the tokens generated so far; the client sees one answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vlcache_dist import wire
from vlcache_dist.config import Settings
from vlcache_dist.errors import (
    BadRequest,
    CacheError,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    VLCacheError,
    WorkerLost,
)
from vlcache_dist.hashing import ModelIdentity, tenant_salt
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.media import MediaItem, MediaProcessor
from vlcache_dist.media_fetch import MediaFetcher
from vlcache_dist.node import FrontNode
from vlcache_dist.prompt import Prompt, PromptBuilder, TokenText
from vlcache_dist.reuse.guarded import spelled_out
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.reuse.plan_file import resolve_plan
from vlcache_dist.rpc import Call, Reply
from vlcache_dist.serve.chat import AnswerStream, ChatEvent, ChatRequest, Done, provenance
from vlcache_dist.serve.dispatch import Dispatcher
from vlcache_dist.serve.donor_context import donor_context
from vlcache_dist.serve.placement import POLICIES, Costs, Demand, SpanDemand
from vlcache_dist.types import FinishReason, ReuseMode, Role, SamplingParams, TokenLogprobs, WorkerId

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 3


@dataclass(slots=True)
class _Answer:
    """One request as it is being answered: what survives the loss of a worker."""

    request: ChatRequest
    reuse: ReuseMode
    plan: str
    prompt: Prompt
    sampling: SamplingParams
    states: Sequence[wire.KeyState]
    deadline: float
    started: float
    generated: list[int] = field(default_factory=list)
    first: wire.Prefilled | None = None
    ttft_s: float = 0.0
    lost: list[WorkerId] = field(default_factory=list)
    attempts: int = 1
    prefill_worker: str = ""
    decode_worker: str = ""
    why: str = ""
    handoff_bytes: int = 0
    handoff_images: int = 0
    finish: FinishReason | None = None

    def remaining(self) -> float:
        """Seconds. Raises DeadlineExceeded when there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's time is over")
        return left


class Frontend:
    """Implements ``serve.chat.ChatBackend`` over the pools. One event loop's."""

    def __init__(
        self,
        node: FrontNode,
        settings: Settings,
        *,
        model: str,
        layout: KVLayout,
        identity: ModelIdentity,
        processor: MediaProcessor,
        prompts: PromptBuilder,
        eos_token_ids: Sequence[int],
        costs: Costs | None = None,
    ) -> None:
        self.node = node
        self._settings = settings
        self._model = model
        self._layout = layout
        self._identity = identity
        self._processor = processor
        self._prompts = prompts
        self._eos = frozenset(eos_token_ids)
        self._tokens = TokenText(prompts.tokenizer)
        self._fetcher = MediaFetcher(settings.media)
        self._media: dict[str, list[MediaItem]] = {}
        self._dispatch = Dispatcher(node.members, costs or Costs(), POLICIES[settings.serve.placement])
        donors = settings.engine.donors
        self._donor = None if donors == "first" else donor_context(prompts, ahead=donors == "canonical")
        self._default_plan = str(resolve_plan(settings.engine.plan, model=layout.model, num_layers=layout.num_layers))
        node.handle(wire.GetMedia, self._get_media)

    @property
    def model(self) -> str:
        return self._model

    @property
    def max_model_len(self) -> int:
        return self._prompts.max_model_len

    async def start(self) -> None:
        await self.node.start()

    async def close(self) -> None:
        await self.node.close()
        await self._fetcher.close()

    async def health(self) -> dict[str, Any]:
        """Living workers by role. Raises WorkerLost while a pool is empty."""
        counts = {role: len(self._dispatch.workers(role)) for role in Role}
        needed = {Role.ENCODER} if counts[Role.COLOCATED] else {Role.ENCODER, Role.PREFILL, Role.DECODE}
        missing = [role.value for role in Role if role in needed and not counts[role]]
        if missing:
            raise WorkerLost(f"no {', '.join(missing)} worker is alive")
        return {"workers": {role.value: count for role, count in counts.items() if count}}

    async def status(self) -> dict[str, Any]:
        """What every worker says of itself."""
        members = list(self.node.members())

        async def ask(member: wire.Member) -> dict[str, Any]:
            about = {
                "name": member.info.name,
                "worker_id": member.info.worker_id,
                "role": member.info.role.value,
                "load": msgspec.to_builtins(member.load),
            }
            try:
                reply = await self.node.client.call(member.info.address, wire.Status(), timeout_s=2.0)
                assert isinstance(reply, wire.StatusReply)
                return {**about, **reply.status}
            except VLCacheError as error:
                return {**about, "error": str(error)}

        workers = await asyncio.gather(*map(ask, members))
        return {"model": self._model, "ingress": {"pid": os.getpid()}, "workers": workers}

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """See ``ChatBackend.chat``."""
        ahead: list[asyncio.Task[None]] = []
        if request.request_id in self._media:
            raise BadRequest(f"request {request.request_id!r} is under way already")
        self._media[request.request_id] = []
        try:
            answer = await self._prepare(request, ahead)
            stream = AnswerStream(self._tokens, answer.sampling)
            async with aclosing(self._generate(answer)) as tokens:
                async for token_id, logprobs in tokens:
                    if token_id in self._eos and not answer.sampling.ignore_eos:
                        continue
                    yield stream.feed(token_id, logprobs)
                    if stream.stopped:
                        answer.finish = FinishReason.STOP
                        break
            if not stream.stopped:
                yield stream.finish()
            yield self._done(answer)
        finally:
            for task in ahead:
                task.cancel()  # what the encoder has not begun is for nobody any more
            del self._media[request.request_id]

    # -- before the pools ---------------------------------------------------------------------------------------

    async def _prepare(self, request: ChatRequest, ahead: list[asyncio.Task[None]]) -> _Answer:
        """Media, keys, prompt. Nothing is decoded for a picture that the directory knows; the others are sent ahead."""
        started = time.monotonic()
        reuse = request.reuse or self._settings.engine.reuse
        if request.plan is not None and reuse is not ReuseMode.APPROX:
            raise BadRequest(f"a plan goes with reuse 'approx', not with {reuse.value!r}")
        plan = self._default_plan if request.plan is None else spelled_out(request.plan, self._layout.num_layers)
        items = await self._fetcher.load_all(request.conversation.media)
        self._media[request.request_id] = items
        off = reuse is ReuseMode.OFF
        # What `reuse=off` computes is nobody else's: its keys are salted with the request.
        salt = tenant_salt(f"{request.tenant}\x00{request.request_id}" if off else request.tenant, b"")
        keys = [self._processor.content_key(item, salt, self._identity) for item in items]
        states = [wire.KeyState(key, None) for key in keys] if off else await self.node.lookup(keys)
        metas = [
            known.meta if known.meta is not None else await asyncio.to_thread(self._processor.meta, item)
            for known, item in zip(states, items, strict=True)
        ]
        prompt = self._prompts.build(request.conversation, keys, metas)
        sampling = request.sampling_for(len(prompt.token_ids), self.max_model_len)
        answer = _Answer(
            request, reuse, plan, prompt, sampling, states, started + self._settings.serve.request_timeout_s, started
        )
        self._encode_ahead(answer, ahead)
        return answer

    def _encode_ahead(self, answer: _Answer, ahead: list[asyncio.Task[None]]) -> None:
        """Send pictures that nobody knows to an encoder at once: it works while the request finds its way."""
        seen: set[bytes] = set()
        off = answer.reuse is ReuseMode.OFF
        for span, state in zip(answer.prompt.spans, answer.states, strict=True):
            if span.key in seen or state.kv or state.embedding or state.producer:
                continue
            seen.add(span.key)
            addresses = self.node.encoders(span.key)
            if addresses:
                message = wire.Encode(span, self._source(answer), answer.remaining(), private=off)
                files = self._media[answer.request.request_id][span.index].frames
                ahead.append(self.node.spawn(self._encode(addresses[0], message, files)))

    async def _encode(self, address: str, message: wire.Encode, files: Sequence[bytes]) -> None:
        try:
            await self.node.client.call(address, message, attachments=files, timeout_s=message.timeout_s)
        except VLCacheError as error:
            log.info("encoding ahead failed; the prefill worker will ask again: %s", error)

    async def _get_media(self, message: wire.GetMedia, call: Call) -> Reply:
        """Handler of ``wire.GetMedia``: an encoder wants a picture's bytes."""
        items = self._media.get(message.request_id)
        if items is None or not 0 <= message.index < len(items):
            raise ProtocolError(f"request {message.request_id} has no media item {message.index} (any more)")
        frames = items[message.index].frames
        return Reply(wire.MediaReply(len(frames)), frames)

    # -- through the pools --------------------------------------------------------------------------------------

    async def _generate(self, answer: _Answer) -> AsyncGenerator[tuple[int, TokenLogprobs | None], None]:
        """The answer's tokens; a lost worker is replaced, and work goes on behind the last token."""
        while answer.finish is None:
            handoff: wire.Handoff | None = None
            try:
                async with aclosing(self._prefill(answer)) as replies:
                    async for reply in replies:
                        if isinstance(reply, wire.Prefilled):
                            handoff = reply.handoff
                            answer.generated.append(reply.token_id)
                            answer.finish = reply.finish
                            yield reply.token_id, reply.logprobs
                        else:
                            for token in self._take(answer, reply):
                                yield token
                if handoff is None:
                    continue
                async with aclosing(self._decode(answer, handoff)) as tokens:
                    async for token in tokens:
                        handoff = None  # taken over
                        yield token
            except (WorkerLost, CacheError, Overloaded) as error:
                if answer.attempts >= MAX_ATTEMPTS:
                    if isinstance(error, Overloaded):
                        raise
                    raise WorkerLost(f"gave up after {answer.attempts} attempts: {error}") from error
                known = len(answer.generated)
                log.warning("%s: %s; trying again behind %d tokens", answer.request.request_id, error, known)
                answer.attempts += 1
                answer.remaining()
            finally:
                if handoff is not None:
                    self.node.spawn(self._release(handoff))

    async def _prefill(self, answer: _Answer) -> AsyncGenerator[wire.Prefilled | wire.Tokens, None]:
        """The first token; behind it, from a worker that decodes as well, the others."""
        if not self._dispatch.workers(Role.DECODE, Role.COLOCATED):
            raise WorkerLost("no decode worker is alive")
        member, choice = self._dispatch.choose_prefill(self._demand(answer), answer.request.prefill_worker, answer.lost)
        answer.prefill_worker, answer.why = member.info.name, choice.why
        message = wire.Prefill(
            self._generation(answer), self._source(answer), answer.remaining(), self._hints(answer), self._donor
        )
        heard = False
        try:
            with ExitStack() as counted:
                counted.enter_context(self._dispatch.prefilling(member.info.worker_id, choice.active_tokens))
                timeout_s = answer.remaining()
                async with self.node.client.stream(member.info.address, message, timeout_s=timeout_s) as replies:
                    async for reply in replies:
                        if not isinstance(reply, wire.Prefilled | wire.Tokens):
                            raise ProtocolError(f"Prefill was answered with {type(reply).__name__}")
                        heard = True
                        if isinstance(reply, wire.Prefilled):
                            counted.close()
                            if answer.first is None:
                                answer.first, answer.ttft_s = reply, time.monotonic() - answer.started
                            if member.info.role is Role.COLOCATED:
                                answer.decode_worker = member.info.name
                                counted.enter_context(self._dispatch.decoding(member.info.worker_id))
                        yield reply
                        if isinstance(reply, wire.Prefilled) and (reply.finish or reply.handoff):
                            return
        except (WorkerLost, Overloaded):
            answer.lost.append(member.info.worker_id)
            raise
        finally:
            if not heard and member.info.role is Role.PREFILL:
                # Its answer may be on the way: a ticket bears its request's name, and an unknown one is ignored.
                self.node.spawn(self._release_ticket(member.info.address, message.generation.request_id))
        if answer.finish is None:
            raise ProtocolError(f"{member.info.worker_id} ended without finishing")

    async def _release_ticket(self, address: str, ticket: str) -> None:
        try:
            await self.node.client.call(address, wire.ReleaseHandoff(ticket), timeout_s=5.0)
        except VLCacheError as error:
            log.info("%s did not hear that %s is over: %s", address, ticket, error)

    @staticmethod
    def _take(answer: _Answer, reply: wire.Tokens) -> list[tuple[int, TokenLogprobs | None]]:
        """Book a piece of the answer."""
        answer.handoff_bytes += reply.bytes_moved
        answer.handoff_images += reply.images_moved
        answer.generated += reply.token_ids
        answer.finish = reply.finish
        return list(zip(reply.token_ids, reply.logprobs or (None,) * len(reply.token_ids), strict=True))

    async def _decode(
        self, answer: _Answer, handoff: wire.Handoff
    ) -> AsyncGenerator[tuple[int, TokenLogprobs | None], None]:
        member = self._dispatch.choose_decode(answer.lost)
        answer.decode_worker = member.info.name
        first = answer.generated[-1]
        generation = self._generation(answer, behind_prefill=True)
        message = wire.Decode(generation, first, handoff, self._source(answer), answer.remaining())
        try:
            with self._dispatch.decoding(member.info.worker_id):
                timeout_s = answer.remaining()
                async with self.node.client.stream(member.info.address, message, timeout_s=timeout_s) as replies:
                    async for reply in replies:
                        if not isinstance(reply, wire.Tokens):
                            raise ProtocolError(f"Decode was answered with {type(reply).__name__}")
                        for token in self._take(answer, reply):
                            yield token
        except (WorkerLost, Overloaded):
            answer.lost.append(member.info.worker_id)
            raise
        except CacheError:
            answer.lost.append(handoff.worker_id)  # whatever was wrong, another pair may do better
            raise
        if answer.finish is None:
            raise ProtocolError(f"{member.info.worker_id} ended without finishing")

    async def _release(self, handoff: wire.Handoff) -> None:
        try:
            await self.node.client.call(handoff.address, wire.ReleaseHandoff(handoff.ticket), timeout_s=5.0)
        except VLCacheError as error:
            log.warning("%s did not hear that %s is over: %s", handoff.worker_id, handoff.ticket, error)

    # -- pieces -------------------------------------------------------------------------------------------------

    def _source(self, answer: _Answer) -> wire.MediaSource:
        return wire.MediaSource(self.node.address, answer.request.request_id)

    def _generation(self, answer: _Answer, *, behind_prefill: bool = False) -> wire.Generation:
        """The request as workers see it. Tokens generated before a worker was lost are part of the prompt."""
        known = answer.generated[:-1] if behind_prefill else answer.generated
        return wire.Generation(
            request_id=f"{answer.request.request_id}.{answer.attempts}",
            tenant=answer.request.tenant,
            token_ids=answer.prompt.token_ids + tuple(known),
            spans=answer.prompt.spans,
            sampling=answer.sampling,
            reuse=answer.reuse,
            plan=answer.plan,
            num_generated=len(known),
        )

    @staticmethod
    def _hints(answer: _Answer) -> tuple[wire.KeyState, ...]:
        """What the directory said when the request came in; old news for a second attempt."""
        return tuple(state for state in answer.states if state.kv) if answer.attempts == 1 else ()

    def _demand(self, answer: _Answer) -> Demand:
        plan = Plan.parse(answer.plan)
        spans = []
        for span, state in zip(answer.prompt.spans, answer.states, strict=True):
            spans.append(
                SpanDemand(
                    key=span.key,
                    tokens=span.length,
                    kv_bytes=self._layout.kv_elements(span.length) * self._layout.itemsize,
                    recompute=plan.counts(span.length, self._layout.num_layers)[0],
                    holders=frozenset(h.worker_id for h in state.kv),
                    encoded=bool(state.embedding),
                    producer=state.producer,
                )
            )
        vision = sum(span.length for span in answer.prompt.spans)
        text = len(answer.prompt.token_ids) + len(answer.generated) - vision
        return Demand(text, tuple(spans), answer.reuse is ReuseMode.APPROX)

    def _done(self, answer: _Answer) -> Done:
        first = answer.first
        assert first is not None
        return Done(
            finish=answer.finish or FinishReason.STOP,
            prompt_tokens=len(answer.prompt.token_ids),
            completion_tokens=len(answer.generated),
            cached_tokens=first.cached_tokens,
            vlcache=provenance(
                first.reports,
                reuse=answer.reuse.value,
                plan=(first.plan or answer.plan) if answer.reuse is ReuseMode.APPROX else None,
                guard=first.guard,
                prefill_worker=answer.prefill_worker,
                decode_worker=answer.decode_worker,
                placement=answer.why,
                ttft_ms=answer.ttft_s * 1e3,
                queue_ms=first.queue_ms,
                compute_ms=first.compute_ms,
                handoff_bytes=answer.handoff_bytes,
                handoff_images=answer.handoff_images,
                retries=answer.attempts - 1,
            ),
        )
