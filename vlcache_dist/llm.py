"""The engine in one process: pictures and questions in, answers out. No Ray, no server, no threads.

>>> from vlcache_dist import LLM, SamplingParams
>>> llm = LLM(model="tiny", device="cpu", dtype="float32")
>>> out = llm.chat(messages, SamplingParams(max_tokens=32), reuse="approx", plan="guarded")
>>> out.text, out.vlcache[0].reused_tokens
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from vlcache_dist.config import EngineSettings, MediaSettings, ModelSettings
from vlcache_dist.engine.api import (
    Admitted,
    Compute,
    Event,
    Failed,
    Mode,
    PrefillDone,
    RecordDropped,
    Reuse,
    SpanRecorded,
    TokenEvent,
)
from vlcache_dist.engine.build import Placement, build_engine, build_store, kv_layout
from vlcache_dist.engine.engine import Engine, new_variant
from vlcache_dist.engine.warmup import warm_up
from vlcache_dist.errors import BadRequest, EngineError, StoreFull
from vlcache_dist.hashing import ModelIdentity, tenant_salt
from vlcache_dist.kv.arena import Arena
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.media import MediaItem, MediaProcessor
from vlcache_dist.media_fetch import load_blocking
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.parallel.build import build_sharded_engine, open_arenas
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.parallel.processes import Processes
from vlcache_dist.prompt import Detokenizer, PromptBuilder, TokenText, parse_messages
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.reuse.plan_file import resolve_plan
from vlcache_dist.types import (
    ContentKey,
    FinishReason,
    MediaSpan,
    ObjectKind,
    ReuseMode,
    SamplingParams,
    SpanReport,
    TokenLogprobs,
)
from vlcache_dist.wire import Generation

Messages = Sequence[Mapping[str, Any]]
DEFAULT_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True)
class Output:
    """One answer. ``token_ids`` include the end-of-sequence token, ``text`` does not; ``logprobs`` has one entry per
    token if they were asked for, else None. ``vlcache``: provenance per image, in order. ``cached_tokens`` of
    ``prompt_tokens`` were not computed in full. ``ttft_s``: from the call to the first token."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    vlcache: tuple[SpanReport, ...]
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float


@dataclass(slots=True)
class _Request:
    """A conversation on its way."""

    generation: Generation
    items: list[MediaItem]
    plan: Plan
    text: Detokenizer
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    unresolved: list[int] = field(default_factory=list)  # spans that need a source, in prompt order
    done: PrefillDone | None = None
    first_token_at: float = 0.0
    finish: FinishReason | None = None


class LLM:
    """A model with its vision tower, image store and engine, all in the calling thread; with ``engine.tensor_parallel``
    above 1 the language model's other ranks are processes of their own, on the GPUs behind ``device``'s.

    ``model``: ``tiny`` (bundled), a checkpoint folder, or a hub name. ``donors`` (None: ``engine.donors``): whose image
    KV is reused, as in the workers; there is no background here, so with ``background`` a call that has shown new
    pictures records them before it returns. Raises ConfigError, CheckpointError and UnsupportedModel.
    """

    def __init__(
        self,
        model: str = "tiny",
        device: str = "auto",
        dtype: str = "auto",
        *,
        revision: str | None = None,
        max_model_len: int | None = None,
        donors: str | None = None,
        engine: EngineSettings | None = None,
        media: MediaSettings | None = None,
    ) -> None:
        settings = ModelSettings.of(
            model=model, revision=revision, device=device, dtype=dtype, max_model_len=max_model_len
        )
        engine = engine or EngineSettings()
        if donors is not None:
            engine = EngineSettings.of(**{**engine.model_dump(), "donors": donors})
        self.donors = engine.donors
        placement = Placement.of(settings)
        checkpoint = Checkpoint.open(settings.model, settings.revision)
        self.config = checkpoint.config
        size = engine.tensor_parallel
        self.layout = kv_layout(self.config, checkpoint.fingerprint, placement.dtype, size)
        self._default_plan = self._resolved(engine.plan)
        self._tower = checkpoint.load_vision_tower(placement.device, placement.torch_dtype)
        self.arena, self.store = build_store(self.layout, engine, placement.device)
        if size == 1:
            language = checkpoint.load_language_model(placement.device, placement.torch_dtype)
            self.engine = build_engine(
                language, self.config, engine, self.arena, self.store, max_model_len=settings.max_model_len
            )
        else:
            self.engine = _sharded_engine(checkpoint, settings, engine, self.arena, self.store)
        self._media_settings = media or MediaSettings()
        self.processor = MediaProcessor.from_folder(checkpoint.folder, self._media_settings)
        self.prompts = PromptBuilder.from_folder(
            checkpoint.folder,
            merge_size=self.config.vision.spatial_merge_size,
            max_model_len=self.engine.config.max_model_len,
        )
        self._text = TokenText(self.prompts.tokenizer)
        self._identity = ModelIdentity(settings.model, settings.revision or "", checkpoint.fingerprint, placement.dtype)
        self._salt = tenant_salt("", b"")
        self._ids = itertools.count()
        if placement.device.type == "cuda":
            self._tower.warm_up(engine.graph_start_s)
            warm_up(self.engine)

    def close(self) -> None:
        """End the other ranks' processes, if there are any (``engine.tensor_parallel``); they also end with this
        process. Idempotent; nothing can be asked afterwards then."""
        self.engine.runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *why: object) -> None:
        self.close()

    @overload
    def chat(
        self, messages: Messages, sampling: SamplingParams = ..., *, reuse: str = ..., plan: str | None = ...
    ) -> Output: ...

    @overload
    def chat(
        self, messages: Sequence[Messages], sampling: SamplingParams = ..., *, reuse: str = ..., plan: str | None = ...
    ) -> list[Output]: ...

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams = DEFAULT_SAMPLING,
        *,
        reuse: str = "approx",
        plan: str | None = None,
    ) -> Output | list[Output]:
        """Answer one conversation in OpenAI's message format, or a list of them in one batch.

        Pictures are ``image_url`` parts with ``data:``, ``http(s):`` or ``file:`` URLs. ``reuse``: ``approx`` (image KV
        at any position; ``plan`` says what is recomputed, None: ``engine.plan``), ``exact`` (exact prefixes only) or
        ``off`` (no cache is read or filled). Raises BadRequest and its kin, before anything is computed.
        """
        mode = _reuse_mode(reuse)
        if plan is not None and mode is not ReuseMode.APPROX:
            raise BadRequest(f"plan {plan!r} means nothing with reuse={mode}: only approx recomputes by a plan")
        resolved = self._default_plan if plan is None else self._resolved(plan)
        if not messages:
            raise BadRequest("messages: a conversation, or a list of them, is wanted")
        single = isinstance(messages[0], Mapping)
        conversations = [messages] if single else messages
        requests = [self._request(c, sampling, mode, resolved) for c in conversations]  # type: ignore[arg-type]
        outputs = self._run(requests)
        return outputs[0] if single else outputs

    def _resolved(self, plan: str) -> Plan:
        return resolve_plan(plan, model=self.layout.model, num_layers=self.layout.num_layers)

    # -- one batch ----------------------------------------------------------------------------------------------

    def _request(self, messages: Messages, sampling: SamplingParams, reuse: ReuseMode, plan: Plan) -> _Request:
        conversation = parse_messages(messages)
        items = load_blocking(self._media_settings, conversation.media) if conversation.media else []
        keys = [self.processor.content_key(item, self._salt, self._identity) for item in items]
        metas = [self.processor.meta(item) for item in items]
        prompt = self.prompts.build(conversation, keys, metas, max_tokens=sampling.max_tokens)
        generation = Generation(
            request_id=self.new_id(),
            tenant="",
            token_ids=prompt.token_ids,
            spans=prompt.spans,
            sampling=sampling,
            reuse=reuse,
            plan=str(plan),
        )
        return _Request(generation, items, plan, Detokenizer(self._text, sampling.stop))

    def _run(self, requests: list[_Request]) -> list[Output]:
        started = time.monotonic()
        batch = _Batch(self, {r.generation.request_id: r for r in requests})
        try:
            for request in requests:
                self.engine.add(request.generation, started)
            batch.run()
            if self.donors == "background":
                batch.record_alone()
        except BaseException:
            batch.abort()
            self.engine.step(time.monotonic())
            raise
        outputs = [self._output(request, started) for request in requests]
        self._tower.prepare()  # a piece of it: whoever calls in a loop is served the better next time
        self.engine.idle()
        return outputs

    def _output(self, request: _Request, started: float) -> Output:
        if request.finish is None or request.done is None:
            raise EngineError("the engine came to rest before the answer was complete")
        if not request.text.stopped:
            request.pieces.append(request.text.finish())
        return Output(
            text="".join(request.pieces),
            token_ids=tuple(request.token_ids),
            logprobs=None if request.generation.sampling.logprobs is None else tuple(request.logprobs),
            finish_reason=request.finish,
            vlcache=request.done.reports,
            prompt_tokens=len(request.generation.token_ids),
            cached_tokens=request.done.cached_tokens,
            ttft_s=request.first_token_at - started,
        )

    def new_id(self) -> str:
        """A request id that was not used before."""
        return str(next(self._ids))

    # -- encoder output -----------------------------------------------------------------------------------------

    def embedding(self, item: MediaItem, span: MediaSpan, *, cached: bool) -> Extent:
        """The span's encoder output, pinned: from the store, or encoded now (and kept only if ``cached``)."""
        if cached and (found := self.store.lookup(ObjectKind.EMBEDDING, span.key, pin=True)) is not None:
            return found
        patches = self.processor.patches(item)
        if patches.grid != span.grid:
            raise EngineError(f"{item.where}: its header promised a grid of {span.grid}, it has {patches.grid}")
        rows = self._tower.forward(torch.from_numpy(patches.values), [patches.grid])
        now, elements = time.monotonic(), self.layout.embedding_elements(span.length)
        if cached:
            extent = self.store.begin(ObjectKind.EMBEDDING, span.key, new_variant(), elements, now)
        else:
            extent = self.store.stage(elements, now)
        self.engine.runner.store_embeddings(rows, extent)
        return self.store.commit(extent, pin=True)


def _sharded_engine(
    checkpoint: Checkpoint, model: ModelSettings, settings: EngineSettings, arena: Arena, store: ObjectStore
) -> Engine:
    group = ShardGroup(Processes(), settings.tensor_parallel)
    try:
        open_arenas(group, arena.tensor, arena.layout)
        return build_sharded_engine(group, checkpoint, settings, arena, store, max_model_len=model.max_model_len)
    except BaseException:
        group.close()
        raise


class _Batch:
    """Drives the engine until every request of one call is answered, and gives spans their sources on the way."""

    def __init__(self, llm: LLM, requests: dict[str, _Request]) -> None:
        self._llm = llm
        self._requests = requests
        self._recording: set[ContentKey] = set()
        self._alone: dict[str, ContentKey] = {}  # recordings in the canonical context, by request id
        self._given_up: set[ContentKey] = set()  # not to be recorded like that in this call

    def run(self) -> None:
        engine = self._llm.engine
        while any(request.finish is None for request in self._requests.values()):
            if not self._resolve() and not engine.has_work():
                if not self._alone:
                    raise EngineError("no request can go on")
                self._end_alone()  # no room for them beside the requests that wait for them
            for event in engine.step(time.monotonic()):
                self._handle(event)

    def record_alone(self) -> None:
        """Record what the requests have shown in the canonical context; what finds no room is left."""
        llm = self._llm
        for request in self._requests.values():
            for span in request.generation.spans if request.generation.reuse is not ReuseMode.OFF else ():
                if span.key not in self._recording and llm.store.lookup(ObjectKind.KV, span.key) is None:
                    self._begin_alone(request.items[span.index], span)
        while self._alone:
            if not llm.engine.has_work():
                self._end_alone()
            for event in llm.engine.step(time.monotonic()):
                self._handle(event)

    def _begin_alone(self, item: MediaItem, span: MediaSpan) -> bool:
        """Queue the recording of a picture in the canonical context; False if there is no room for it."""
        llm = self._llm
        if span.key in self._given_up:
            return False
        prompt = llm.prompts.alone(span.key, llm.processor.meta(item))
        (alone,) = prompt.spans
        self._given_up.add(span.key)  # tried once
        try:
            elements = llm.layout.kv_elements(span.length)
            record = llm.store.begin(ObjectKind.KV, span.key, new_variant(), elements, time.monotonic())
        except StoreFull:
            return False
        try:
            source = Compute(llm.embedding(item, alone, cached=True), record)
        except BaseException:
            llm.store.abort(record)
            raise
        request_id = llm.new_id()
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        generation = Generation(request_id, "", prompt.token_ids, prompt.spans, sampling, ReuseMode.EXACT, "none")
        try:
            llm.engine.add(generation, time.monotonic(), Mode.RECORD)
        except BaseException:
            llm.store.unpin(source.embedding)
            llm.store.abort(record)
            raise
        self._alone[request_id] = span.key
        self._recording.add(span.key)
        llm.engine.provide(request_id, 0, source)
        return True

    def _end_alone(self) -> None:
        for request_id, key in self._alone.items():
            self._llm.engine.abort(request_id)
            self._recording.discard(key)
        self._alone.clear()

    def abort(self) -> None:
        """End everything that this batch has in the engine."""
        self._end_alone()
        for request_id in self._requests:
            self._llm.engine.abort(request_id)

    def _handle(self, event: Event) -> None:
        if event.request_id not in self._requests:
            if isinstance(event, TokenEvent | Failed) and event.request_id in self._alone:
                self._recording.discard(self._alone.pop(event.request_id))
            return
        request = self._requests[event.request_id]
        match event:
            case Admitted(needed=needed):
                request.unresolved = list(needed)
            case SpanRecorded(extent=extent):
                self._recording.discard(extent.key)
            case RecordDropped(key=key):
                self._recording.discard(key)
            case PrefillDone():
                request.done = event
                request.first_token_at = time.monotonic()
            case TokenEvent():
                self._token(request, event)
            case Failed(error=error):
                raise error

    def _token(self, request: _Request, event: TokenEvent) -> None:
        if request.finish is not None:
            return
        request.token_ids.append(event.token_id)
        request.pieces.append(request.text.feed(event.token_id))
        if event.logprobs is not None:
            request.logprobs.append(event.logprobs)
        request.finish = event.finish
        if request.text.stopped:
            request.finish = FinishReason.STOP
            if event.finish is None:
                self._llm.engine.abort(event.request_id)

    def _resolve(self) -> bool:
        """Give sources to all spans that can have one now; False if nothing changed."""
        progressed = False
        for request in self._requests.values():
            while request.unresolved and (source := self._source(request, request.unresolved[0])) is not None:
                self._llm.engine.provide(request.generation.request_id, request.unresolved.pop(0), source)
                progressed = True
        return progressed

    def _source(self, request: _Request, index: int) -> Compute | Reuse | None:
        """None: wait, because this batch is computing the same picture, or has the store full for now."""
        try:
            return self._find_source(request, index)
        except StoreFull:
            self._llm.engine.relieve()
            if not self._llm.engine.has_work():
                raise
            return None

    def _find_source(self, request: _Request, index: int) -> Compute | Reuse | None:
        llm, generation = self._llm, request.generation
        span = generation.spans[index]
        item = request.items[span.index]
        if generation.reuse is ReuseMode.OFF:
            return Compute(llm.embedding(item, span, cached=False))
        layers = llm.layout.num_layers
        if generation.reuse is ReuseMode.APPROX and not request.plan.is_full(span.length, layers):
            if (kv := llm.store.lookup(ObjectKind.KV, span.key, pin=True)) is not None:
                depths = request.plan.depths(span.length, layers)
                try:
                    embedding = llm.embedding(item, span, cached=True) if depths.any() else None
                except BaseException:
                    llm.store.unpin(kv)
                    raise
                return Reuse(kv, depths, embedding, canary=request.plan.canary)
            if span.key in self._recording:
                return None
            if llm.donors == "canonical" and self._begin_alone(item, span):
                return None
        return Compute(llm.embedding(item, span, cached=True), self._record(request, index))

    def _record(self, request: _Request, index: int) -> Extent | None:
        """Room to record a span's KV in, if it should be: nobody has it, nobody is at it, and it is a legal donor."""
        llm, span = self._llm, request.generation.spans[index]
        if llm.donors != "first":
            return None  # nothing of a request's own context is kept
        if span.key in self._recording or llm.store.lookup(ObjectKind.KV, span.key) is not None:
            return None
        if not llm.engine.recordable(request.generation.request_id, index):
            return None
        elements = llm.layout.kv_elements(span.length)
        try:
            record = llm.store.begin(ObjectKind.KV, span.key, new_variant(), elements, time.monotonic())
        except StoreFull:
            return None  # computed all the same; the next request pays again
        self._recording.add(span.key)
        return record


def _reuse_mode(reuse: str) -> ReuseMode:
    try:
        return ReuseMode(reuse)
    except ValueError:
        raise BadRequest(f"reuse {reuse!r} is not one of off, exact, approx") from None
