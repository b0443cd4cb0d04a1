"""The engine: requests in, events out; schedule, run, postprocess. One thread owns it, and time is an argument.

::

    add ──> waiting ──Admitted──> running ──────────────> finished
                                    │  ^ provide(span)        │ PREFILL mode
                                    │                         └──> parked ──export──release──> gone
                                    └ abort at any time: everything it held is freed

A request is admitted, first come first served, when all blocks it can ever need are free: nothing is preempted later.
It is computed up to the first span that has no source yet. Behind a source that is still arriving it is computed ahead,
layers by layers, and what comes of that counts when the source is admitted (``engine.streaming``).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np

from vlcache_dist.engine.accounts import Accounts
from vlcache_dist.engine.api import (
    Admitted,
    Compute,
    EngineStats,
    Event,
    Export,
    Failed,
    Import,
    Mode,
    PrefillDone,
    Reuse,
    SpanRecorded,
    TokenEvent,
)
from vlcache_dist.engine.batch import ChunkWork, StepBatch, build_step
from vlcache_dist.engine.handoff import HandoverBook
from vlcache_dist.engine.origins import SlotOrigins
from vlcache_dist.engine.runner import Runner
from vlcache_dist.engine.scheduler import Scheduler
from vlcache_dist.engine.sequence import Sequence, SpanState, prompt_tokens
from vlcache_dist.engine.sources import SourceBook
from vlcache_dist.engine.streaming import StreamedChunk, Streamer
from vlcache_dist.engine.verdict import Drawn, Ratios, Verdicts
from vlcache_dist.engine.watch import Look
from vlcache_dist.errors import BadRequest, EngineError, Overloaded, PromptTooLong, VLCacheError, WorkerLost
from vlcache_dist.kv.block_chain import BlockChain
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.kv.paged_pool import PagedPool
from vlcache_dist.kv.prefix_cache import PrefixCache, PrefixMatch
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.rope import mrope_positions
from vlcache_dist.types import FinishReason, ObjectKind, ReuseMode, TokenLogprobs, Variant
from vlcache_dist.wire import Generation

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  #: in a row; then the device is taken for broken and ``step`` raises


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """``max_batch_tokens`` rows per step, ``max_running`` admitted and ``max_waiting`` queued requests,
    ``max_model_len`` tokens of prompt and answer. ``graph_start_s``: seconds for capturing graphs in ``warm_up``."""

    block_size: int
    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_model_len: int
    graph_start_s: float = 0.0


def new_variant() -> Variant:
    """A fresh name for the result of one computation."""
    return os.urandom(16)


class Engine:
    """Owns the paged pool and both prefix caches; shares ``store`` and the runner's arena with the worker."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        runner: Runner,
        store: ObjectStore,
        streamer: Streamer | None = None,
    ) -> None:
        if runner.pages.shape[3] != config.block_size:
            raise ValueError(f"pages have blocks of {runner.pages.shape[3]} tokens, not {config.block_size}")
        self.config = config
        self.model = model
        self.runner = runner
        self.store = store
        self.pool = PagedPool(runner.pages.shape[2])
        self.prefix = PrefixCache(self.pool)
        self.layout = runner.arena.layout
        self._scheduler = Scheduler(config.max_batch_tokens, config.max_running)
        self._sequences: dict[str, Sequence] = {}
        self._parked: dict[str, Sequence] = {}
        self._origins = SlotOrigins(self.pool.num_blocks * config.block_size)
        self._handovers = HandoverBook(store, runner, self._origins, self.layout)
        self._events: list[Event] = []
        self._no_blocks = False  # for the head of the queue, until somebody gives some back
        self._streamer = streamer or Streamer(runner)
        self._stream: StreamedChunk | None = None
        self._failed_steps = 0
        self._sources = SourceBook(store, self.layout, self._emit)
        self._accounts = Accounts(self.layout.num_layers)
        self._verdicts = Verdicts(runner, store, self._sources, self._accounts.counters)

    # -- requests -----------------------------------------------------------------------------------------------

    def add(self, generation: Generation, now: float, mode: Mode = Mode.GENERATE) -> None:
        """Queue a request. Raises PromptTooLong if it can never fit, BadRequest if nothing is to be generated or the
        prompt is empty or ends in a picture, Overloaded if the queue is full, ValueError for a request id in use or
        spans that do not fit the prompt. ``Admitted`` follows from a later ``step``. Sources may be provided before
        or after it; those for spans that turn out to lie in the prefix cache are given back unused. A worker should not
        claim the production of an object before ``Admitted``: a request that waits here makes no progress."""
        if generation.request_id in self._sequences:
            raise ValueError(f"request {generation.request_id} is here already")
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise Overloaded(f"{self.config.max_waiting} requests wait already")
        sampling, num_prompt = generation.sampling, len(generation.token_ids)
        if sampling.max_tokens <= generation.num_generated:
            raise BadRequest(f"max_tokens {sampling.max_tokens}: nothing is left to generate")
        if num_prompt == 0 or (generation.spans and generation.spans[-1].end == num_prompt):
            raise BadRequest("a prompt must end with text")
        if num_prompt - generation.num_generated + sampling.max_tokens > self.config.max_model_len:
            raise PromptTooLong(
                f"{num_prompt} prompt tokens and {sampling.max_tokens} for the answer: "
                f"more than {self.config.max_model_len}"
            )
        positions, delta = mrope_positions(num_prompt, generation.spans, self.model)
        tokens = prompt_tokens(generation)
        sequence = Sequence(
            generation,
            tokens,
            mode,
            positions,
            delta,
            self._chain(generation, tokens, mode),
            num_layers=self.layout.num_layers,
            block_size=self.config.block_size,
            arrived=now,
        )
        if (needed := self._blocks_for(sequence)) > self.pool.num_blocks:
            raise PromptTooLong(
                f"prompt and answer need {needed} KV blocks of {self.config.block_size} tokens, there are "
                f"{self.pool.num_blocks}"
            )
        self._sequences[sequence.request_id] = sequence
        self._scheduler.waiting.append(sequence)

    def recordable(self, request_id: str, span_index: int) -> bool:
        """True if the span, given a ``Compute`` source now, may be recorded: the request is not ``off``, no earlier
        span is approximated, none of it lies in the prefix cache, and it is the first of its key in the prompt.
        Meaningful once all earlier spans have their sources. False for an unknown request."""
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.recordable(span_index)

    def provide(self, request_id: str, span_index: int, source: Compute | Reuse) -> None:
        """Give a span its source; takes over its extents (see ``engine.api``) also if the request is gone or the source
        is not needed. Raises ValueError (nothing is taken over) for a source that does not fit the span or the
        request's reuse mode, or a span that has one already."""
        sequence = self._sequences.get(request_id)
        if sequence is None or not sequence.spans[span_index].needs_source:
            if sequence is not None and sequence.spans[span_index].source is not None:
                raise ValueError(f"span {span_index} of {request_id} has its source already")
            self._sources.give_back(request_id, span_index, source)
            return
        self._sources.check(sequence, span_index, source)
        if not sequence.blocks:
            if span_index in sequence.early:
                raise ValueError(f"span {span_index} of {request_id} has its source already")
            sequence.early[span_index] = source
            return
        self._sources.take(sequence, span_index, source)

    def arrived(self, request_id: str, span_index: int, num_layers: int) -> None:
        """Layers [0, ``num_layers``) of an arriving source are in its extent. Ignored for a source that is gone."""
        state = self._arriving(request_id, span_index)
        if state is not None:
            state.layers_here = max(state.layers_here, num_layers)

    def admit(self, request_id: str, span_index: int, kv: Extent, embedding: Extent | None = None) -> None:
        """An arriving source is all there and valid, as ``kv`` and, with ``rows_arrive``, ``embedding`` (committed,
        pinned), which are taken over also if the request is gone."""
        state = self._arriving(request_id, span_index)
        if state is None:
            for extent in (kv, embedding):
                if extent is not None:
                    self._sources.let_go(extent)
            return
        self._sequences[request_id].admit(span_index, kv, embedding)
        if self._stream is not None and self._stream.moved:
            self._drop_stream()

    def revoke(self, request_id: str, span_index: int) -> None:
        """An arriving source is late or not valid: what was computed from it is undone, and the span needs another
        one. Ignored for a source that is gone."""
        state = self._arriving(request_id, span_index)
        if state is None:
            return
        sequence = self._sequences[request_id]
        if self._stream is not None and self._stream.sequence is sequence:
            self._drop_stream()
        self._sources.unhold(state, keep_kv=False)
        sequence.withdraw(span_index)
        self._accounts.counters["spans_revoked"] += 1

    def relieve(self) -> None:
        """The store is full: let the next step also compute the few rows that wait for the source behind them, because
        their own sources' extents become free with that. No ``has_work`` after it means that there are none."""
        self._scheduler.hold_back = False

    def abort(self, request_id: str) -> bool:
        """Forget a request in any state, parked included, and free all it held. False if there is no such request.
        Records under way are dropped; their ``RecordDropped`` events come with the next ``step``."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._accounts.counters["aborted"] += 1
        self._forget(sequence)
        return True

    # -- the loop -----------------------------------------------------------------------------------------------

    def step(self, now: float) -> list[Event]:
        """Admit, run one forward pass, return what happened. Device work that events speak of is finished. What
        happened before the pass is returned without it: a token, or a request that looks for its sources, is not to
        wait for other requests' tokens. Raises EngineError when several passes in a row have failed: the device must be
        taken for broken."""
        self._admit(now)
        self._advance_stream(now)
        if not self._events:
            work = self._scheduler.schedule()
            self._scheduler.hold_back = True
            if work:
                self._run(work, now)
        events, self._events = self._events, []
        return events

    def has_work(self) -> bool:
        """True if ``step`` would do something now (a request that only waits for a source is no work)."""
        if self._events or self._scheduler.can_run():
            return True
        if self._stream.ready if self._stream is not None else self._scheduler.next_stream() is not None:
            return True
        return not self._no_blocks and self._scheduler.next_waiting() is not None

    def idle(self) -> bool:
        """Use the time in which nobody waits; False if there is nothing to do with it, or if some request is here: its
        source, or who takes it over, may come any moment."""
        return not self._sequences and (self.runner.prepare() or self._streamer.prepare())

    def _admit(self, now: float) -> None:
        while (sequence := self._scheduler.next_waiting()) is not None:
            if self._no_blocks or not self._reserve(sequence):
                self._no_blocks = True
                return
            self._scheduler.admitted()
            sequence.admitted_at = now
            early, sequence.early = sequence.early, {}
            for index in sorted(early):
                if sequence.spans[index].needs_source:
                    self._sources.take(sequence, index, early[index])
                else:
                    self._sources.give_back(sequence.request_id, index, early[index])
            needed = tuple(i for i, state in enumerate(sequence.spans) if state.needs_source)
            if sequence.mode is Mode.DECODE:
                needed = ()
            self._events.append(Admitted(sequence.request_id, needed, sequence.prefix_tokens))

    def _run(self, work: list[tuple[Sequence, ChunkWork]], now: float) -> None:
        chunks = [chunk for _, chunk in work]
        sampled = [sequence for sequence, chunk in work if chunk.sample]
        try:
            batch = self._step(chunks)
            forward = self.runner.launch(batch, [s.sampling for s in sampled], [s.num_generated for s in sampled])
            # Hashing a long prompt's blocks takes as long as a warm pass: do it while the device computes. Whoever
            # starts with these blocks is enqueued behind the pass that fills them.
            for sequence, chunk in work:
                sequence.offer(self.prefix, chunk.end)
            looks = {
                sequence.request_id: self._verdicts.look(sequence)
                for sequence in sampled
                if sequence.watch_from is not None
            }
            tokens, logprobs = forward.result()
            seen = {request_id: look.ratios() for request_id, look in looks.items()}
        except WorkerLost:
            raise  # a shard is gone, and the engine with it
        except Exception as error:
            self._pass_failed([sequence for sequence, _ in work], error)
            return
        self._passed(work, batch)
        for sequence, token, logprob in zip(sampled, tokens, logprobs, strict=True):
            if sequence.request_id in seen:
                look, drawn = looks[sequence.request_id], (token, logprob)
                if self._settle(sequence, look, seen[sequence.request_id], drawn, now):
                    continue  # this token is not released: the sequence goes back and draws it again
            self._token(sequence, token, logprob, now)

    def _advance_stream(self, now: float) -> None:
        """Take the pass behind an arriving source further up; conclude it once its source is admitted."""
        if self._stream is None and (start := self._scheduler.next_stream()) is not None:
            sequence, chunk = start
            try:
                self._stream = StreamedChunk(self._streamer, sequence, chunk, self._step([chunk]))
            except WorkerLost:
                raise
            except Exception as error:
                self._pass_failed([sequence], error)
                return
            self._accounts.counters["spans_streamed"] += len(self._stream.spans)
        stream = self._stream
        if stream is None:
            return
        sequence, chunk = stream.sequence, stream.chunk
        try:
            if not stream.advance():
                return
            if stream.look is None and chunk.sample and sequence.watch_from is not None:
                stream.look = self._verdicts.look(sequence)
            if not stream.admitted:
                return
            sequence.offer(self.prefix, chunk.end)  # while the device computes, as in ``_run``
            tokens, logprobs = stream.result().result()
            ratios = None if stream.look is None else stream.look.ratios()
        except WorkerLost:
            raise
        except Exception as error:
            self._pass_failed([sequence], error)
            return
        self._stream, sequence.streaming = None, False
        self._passed([(sequence, chunk)], stream.step)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if stream.look is not None and ratios is not None:
                if self._settle(sequence, stream.look, ratios, (token, logprob), now):
                    continue
            self._token(sequence, token, logprob, now)

    def _drop_stream(self) -> None:
        assert self._stream is not None
        self._stream.erase()
        self._stream = None

    def _arriving(self, request_id: str, span_index: int) -> SpanState | None:
        sequence = self._sequences.get(request_id)
        state = None if sequence is None else sequence.spans[span_index]
        return state if state is not None and state.arriving else None

    def _step(self, chunks: list[ChunkWork]) -> StepBatch:
        return build_step(
            chunks,
            num_layers=self.layout.num_layers,
            block_size=self.config.block_size,
            kv_row=self.layout.kv_row,
            hidden=self.layout.hidden,
        )

    def _passed(self, work: list[tuple[Sequence, ChunkWork]], batch: StepBatch) -> None:
        self._failed_steps = 0
        self._origins.clear(batch.slots)
        self._accounts.count(work, batch)
        for sequence, chunk in work:
            self._written(sequence, chunk)

    def _settle(self, sequence: Sequence, look: Look, ratios: Ratios, drawn: Drawn, now: float) -> bool:
        """True: the token that was ``drawn`` is not to be released, its sequence goes back (or has failed)."""
        try:
            back = self._verdicts.settle(sequence, look.spans, ratios, drawn, now)
        except WorkerLost:
            raise
        except Exception as error:
            self._pass_failed([sequence], error)
            return True
        if not back:
            sequence.offer(self.prefix, sequence.num_computed)
        return back

    def _pass_failed(self, sequences: list[Sequence], error: Exception) -> None:
        """They fail; so do all cached blocks, since some of them may have been offered too early."""
        self._failed_steps += 1
        log.exception("a forward pass of %d sequences failed", len(sequences))
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise EngineError(f"{self._failed_steps} forward passes in a row failed: {error}") from error
        for sequence in sequences:
            self._fail(sequence, EngineError(f"forward pass: {type(error).__name__}: {error}"))
        self.pool.drop_contents()

    def _written(self, sequence: Sequence, chunk: ChunkWork) -> None:
        """The chunk's KV is in the pages: commit records, let go of sources."""
        for index, state in enumerate(sequence.spans):
            if state.work is None or state.span.start >= chunk.end:
                continue
            self._trace(sequence, state, chunk)
            if state.span.end <= chunk.end:
                self._span_done(sequence, index, state)
        sequence.num_computed = chunk.end

    def _span_done(self, sequence: Sequence, index: int, state: SpanState) -> None:
        keep = sequence.mode is Mode.PREFILL
        if state.record is not None:
            extent, state.record = self.store.commit(state.record, pin=keep), None
            self._origins.set(sequence.slots(state.span.start, state.span.end), extent.key, extent.variant)
            if keep:
                state.held.append(extent)
            self._accounts.counters["spans_recorded"] += 1
            self._events.append(SpanRecorded(sequence.request_id, index, extent))
        state.work = None
        if sequence.watch_from is None:  # otherwise an alarm may still need it
            self._sources.unhold(state, keep_kv=keep)

    def _token(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now: float) -> None:
        if sequence.num_tokens == sequence.num_prompt:
            self._prefill_done(sequence, now)
        sequence.append(token)
        self._accounts.counters["generated_tokens"] += 1
        finish = None
        if token in self.model.eos_token_ids and not sequence.sampling.ignore_eos:
            finish = FinishReason.STOP
        elif sequence.num_generated >= sequence.sampling.max_tokens:
            finish = FinishReason.LENGTH
        self._events.append(TokenEvent(sequence.request_id, token, logprobs, finish))
        if finish is not None:
            self._accounts.counters["finished"] += 1
            self._forget(sequence)
        elif sequence.mode is Mode.PREFILL:
            self._scheduler.remove(sequence)
            self._parked[sequence.request_id] = sequence

    def _prefill_done(self, sequence: Sequence, now: float) -> None:
        self._events.append(
            PrefillDone(
                sequence.request_id,
                tuple(state.report(self.layout.num_layers) for state in sequence.spans),
                sequence.cached_tokens(),
                sequence.computed_rows,
                queue_s=sequence.admitted_at - sequence.arrived,
                compute_s=now - sequence.admitted_at,
                discarded=sequence.discarded,
            )
        )

    # -- prefill to decode --------------------------------------------------------------------------------------

    def export(self, request_id: str, now: float) -> Export:
        """Pack the parked sequence's rows that no image object can rebuild. Idempotent. Raises StoreFull (try again
        later, or give up and ``release``), ValueError if the request is not parked."""
        sequence = self._parked.get(request_id)
        if sequence is None:
            raise ValueError(f"request {request_id} is not parked")
        if sequence.handover is None:
            sequence.handover = self._handovers.export(sequence, now)
        return sequence.handover.export

    def release(self, request_id: str) -> bool:
        """End a parked sequence: blocks (prefix caches keep their copies), staging, pins. False if there is none."""
        sequence = self._parked.get(request_id)
        if sequence is None:
            return False
        self._accounts.counters["finished"] += 1
        self._forget(sequence)
        return True

    def import_sequence(self, request_id: str, first_token: int, kv: Import) -> None:
        """Fill an admitted DECODE request's pages and go on behind ``first_token``. Takes over ``kv``'s extents also if
        the request is gone; staging is freed on return. Raises ValueError (nothing is taken over) if the rows and
        objects do not cover the positions exactly, or the request does not wait for its KV."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            if sequence.has_kv or not sequence.blocks:
                raise ValueError(f"request {request_id} does not wait for its KV")
            self._handovers.check_import(sequence, kv)
            self._handovers.fill(sequence, kv)
            sequence.has_kv = True
            sequence.num_computed = sequence.num_prompt
            sequence.append(first_token)
        self._handovers.drop_import(kv)

    # -- reports ------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        waiting, running = tuple(self._scheduler.waiting), tuple(self._scheduler.running)
        rows = sum(sequence.waiting_rows() for sequence in (*waiting, *running))
        return self._accounts.stats(
            self.pool,
            self.prefix,
            spans_reused=self._sources.taken,
            waiting=len(waiting),
            running=len(running),
            parked=len(self._parked),
            waiting_tokens=rows,
        )

    def validate(self) -> None:
        """Raise AssertionError unless blocks, pins and extents add up with the requests that hold them."""
        self.store.validate()
        self.prefix.validate()
        waiting, running = list(self._scheduler.waiting), list(self._scheduler.running)
        everybody = [*waiting, *running, *self._parked.values()]
        assert sorted(s.request_id for s in everybody) == sorted(self._sequences), "a request is lost or listed twice"
        references = Counter(block for sequence in everybody for block in sequence.blocks)
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == references[block], f"block {block} has a reference nobody holds"
        for sequence in waiting:
            assert not sequence.blocks, "a waiting request holds blocks"
        for sequence in (*running, *self._parked.values()):
            assert len(sequence.blocks) == self._blocks_for(sequence)
            assert sequence.num_computed <= sequence.num_tokens <= sequence.capacity + 1

    # -- inside -------------------------------------------------------------------------------------------------

    def _blocks_for(self, sequence: Sequence) -> int:
        return -(-sequence.capacity // self.config.block_size)

    def _chain(self, generation: Generation, tokens: np.ndarray, mode: Mode) -> BlockChain | None:
        if mode in (Mode.DECODE, Mode.RECORD) or generation.reuse is ReuseMode.OFF:
            return None
        return BlockChain(
            tokens,
            generation.spans,
            block_size=self.config.block_size,
            tenant=generation.tenant,
            plan=generation.plan,
        )

    def _reserve(self, sequence: Sequence) -> bool:
        """Start with what the prefix caches have and allocate the remaining blocks; False if they are not free."""
        if sequence.chain is None:
            match = PrefixMatch((), 0, None)
        else:
            spans = sequence.generation.spans
            recorded = [s.index for s in spans if self.store.lookup(ObjectKind.KV, s.key) is not None]
            match = self.prefix.match(sequence.chain, sequence.reuse, divisible=recorded)
        fresh = self.pool.allocate(self._blocks_for(sequence) - len(match.blocks))
        if fresh is None:
            self.pool.free(match.blocks)
            return False
        sequence.place([*match.blocks, *fresh], match.num_tokens, match.tainted_from)
        return True

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _trace(self, sequence: Sequence, state: SpanState, chunk: ChunkWork) -> None:
        """Remember which of the chunk's slots hold an object's rows unchanged."""
        source, start = state.source, state.span.start
        a, b = max(start, chunk.start), min(state.span.end, chunk.end)
        if isinstance(source, Reuse) and a < b:
            copied = source.depths[a - start : b - start] == 0
            if state.shifted is not None:  # no object has these rows
                self._origins.clear(sequence.slots(a, b)[copied])
                return
            self._origins.set(sequence.slots(a, b)[copied], source.kv.key, source.kv.variant)

    def _fail(self, sequence: Sequence, error: VLCacheError) -> None:
        self._accounts.counters["failed"] += 1
        self._forget(sequence)
        self._events.append(Failed(sequence.request_id, error))

    def _forget(self, sequence: Sequence) -> None:
        """Give back everything a request holds, in any state."""
        if self._stream is not None and self._stream.sequence is sequence:
            self._drop_stream()
        del self._sequences[sequence.request_id]
        if self._parked.pop(sequence.request_id, None) is None:
            self._scheduler.remove(sequence)
        for index, source in sequence.early.items():
            self._sources.give_back(sequence.request_id, index, source)
        for index, state in enumerate(sequence.spans):
            self._sources.drop_record(sequence, index)
            self._sources.unhold(state, keep_kv=False)
        if sequence.handover is not None:
            self._handovers.drop_export(sequence.handover)
        self.pool.free(sequence.blocks)
        self._no_blocks = False
