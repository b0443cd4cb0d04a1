"""One request inside the engine: its tokens, positions, spans and blocks, and how far it is computed. No tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from vlcache_dist.engine.api import Compute, Export, Mode, Reuse
from vlcache_dist.engine.batch import ChunkWork, SpanWork, block_slots
from vlcache_dist.kv.block_chain import BlockChain
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.kv.prefix_cache import PrefixCache
from vlcache_dist.reuse.canary import Again
from vlcache_dist.types import KVSource, MediaSpan, ReuseMode, SamplingParams, SpanReport, TokenLogprobs
from vlcache_dist.wire import Generation


@dataclass(frozen=True, slots=True)
class Handover:
    """A sequence's export, and the objects pinned for it."""

    export: Export
    pinned: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Doubt:
    """Span ``first`` alarmed, and a second pass is to tell whether that matters. ``logprobs`` fp32 [vocab]: the first
    token's distribution in the pass before. ``drawn``: what was drawn in the first pass. ``passes``: that are left,
    the one under way included."""

    first: int
    again: Again
    logprobs: np.ndarray
    drawn: tuple[int, TokenLogprobs | None]
    passes: int


@dataclass(slots=True)
class SpanState:
    """A span and its source. ``cached``: its leading tokens that lie in the prefix hit (``length``: all of it, and no
    source is needed). ``work``: what batches need of it, until it is computed. ``held``: committed extents pinned for
    it. ``record``: the extent that its KV is recorded in. ``repeated``: an earlier span of the prompt has its key.
    ``arriving``: the source is not admitted yet; it comes in ``groups`` of layers (their edges), of which layers
    [0, ``layers_here``) are there. ``deviation``, ``escalated``, ``why``: see ``SpanReport``. ``shifted``: a copy of
    the source's KV, corrected by what its probes gained, which a second pass reuses instead (one of ``held``)."""

    span: MediaSpan
    repeated: bool
    cached: int = 0
    source: Compute | Reuse | None = None
    work: SpanWork | None = None
    record: Extent | None = None
    held: list[Extent] = field(default_factory=list)
    arriving: bool = False
    groups: tuple[int, ...] = ()
    layers_here: int = 0
    deviation: float | None = None
    escalated: bool = False
    why: str = ""
    shifted: Extent | None = None

    @property
    def needs_source(self) -> bool:
        return self.source is None and self.cached < self.span.length

    def report(self, num_layers: int) -> SpanReport:
        digest, length = self.span.key.hex(), self.span.length
        if self.source is None:
            return SpanReport(digest, KVSource.PREFIX, length, reused_tokens=length)
        if isinstance(self.source, Compute):
            source = KVSource.PREFIX if self.cached else KVSource.COMPUTED
            remembered = self.source.remembered
            why = "remembered" if remembered else ""
            return SpanReport(digest, source, length, reused_tokens=self.cached, escalated=remembered, why=why)
        depths = self.source.depths[self.cached :]
        recomputed = int((depths > 0).sum())
        return SpanReport(
            digest,
            self.source.source,
            length,
            reused_tokens=length - recomputed,
            recomputed_tokens=recomputed,
            recomputed_layer_tokens=int(depths.sum()),
            bytes_moved=self.source.bytes_moved,
            holder=self.source.holder,
            deviation=self.deviation,
            escalated=self.escalated,
            why="trusted" if self.source.trusted and not self.escalated else self.why,
        )


def layer_groups(spans: Iterable[SpanState]) -> tuple[int, ...]:
    """Edges of the finest groups in which any of the spans arrives."""
    return max((state.groups for state in spans), key=len)


def prompt_tokens(generation: Generation) -> np.ndarray:
    """int64 [prompt]. A span is one placeholder over and over, which is faster to count than to convert: a picture's
    16,384 tokens take 0.1 ms instead of 0.5."""
    ids = generation.token_ids
    tokens = np.empty(len(ids), np.int64)
    cursor = 0
    for span in generation.spans:
        tokens[cursor : span.start] = ids[cursor : span.start]
        inside = ids[span.start : span.end]
        constant = inside.count(inside[0]) == len(inside)
        tokens[span.start : span.end] = inside[0] if constant else inside
        cursor = span.end
    tokens[cursor:] = ids[cursor:]
    return tokens


class Sequence:
    """``tokens`` int64 [capacity] and ``positions`` int32 [3, capacity] cover prompt and answer; the first
    ``num_tokens`` tokens are known, the KV of the first ``num_computed`` is in the pages, in every layer."""

    def __init__(
        self,
        generation: Generation,
        tokens: np.ndarray,
        mode: Mode,
        positions: np.ndarray,
        delta: int,
        chain: BlockChain | None,
        *,
        num_layers: int,
        block_size: int,
        arrived: float,
    ) -> None:
        self.generation = generation
        self.mode = mode
        self.num_layers = num_layers
        self.block_size = block_size
        self.num_prompt = len(generation.token_ids)
        self.num_tokens = self.num_prompt
        self.num_generated = generation.num_generated
        self.num_computed = 0
        room = 0 if mode is Mode.PREFILL else max(generation.sampling.max_tokens - self.num_generated, 1) - 1
        #: positions whose KV may ever be written: the last token of an answer is never fed back
        self.capacity = self.num_prompt + room
        self.tokens = np.zeros(self.capacity + 1, np.int64)
        self.tokens[: self.num_prompt] = tokens
        self.positions = np.empty((3, self.capacity), np.int32)
        self.positions[:, : self.num_prompt] = positions
        self.positions[:, self.num_prompt :] = np.arange(self.num_prompt, self.capacity, dtype=np.int32) + delta
        seen: set[bytes] = set()
        self.spans: list[SpanState] = []
        for span in generation.spans:
            self.spans.append(SpanState(span, repeated=span.key in seen))
            seen.add(span.key)
        self.early: dict[int, Compute | Reuse] = {}  # sources that came before admission
        self.chain = chain  # None: takes no part in prefix caching
        self.num_offered = 0  # positions that the prefix caches know
        self.blocks: list[int] = []
        self.block_table = np.empty(0, np.int32)
        self._slots = np.empty(0, np.int64)  # by position
        self.prefix_tokens = 0
        self.tainted_from: int | None = None
        self.watch_from: int | None = None  # the first span whose canary is still to be read
        self._prefix_taint: int | None = None
        self.has_kv = mode is not Mode.DECODE  # a DECODE sequence cannot run before its KV is there
        self.handover: Handover | None = None
        self.streaming = False  # a pass ahead of admission is under way
        self.discarded: tuple[int, TokenLogprobs | None] | None = None  # first token of a pass that a canary threw away
        self.doubt: Doubt | None = None  # a second pass is to settle it
        self.private_from: int | None = None  # from here on, blocks are right for this question alone
        self.computed_rows = 0
        self.arrived = arrived
        self.admitted_at = arrived
        self._active = np.arange(self.num_prompt + 1)  # prefix sums of rows to compute, see ``_count_active``

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.generation.sampling

    @property
    def reuse(self) -> ReuseMode:
        return self.generation.reuse

    @property
    def prefilling(self) -> bool:
        return self.num_computed < self.num_prompt

    @property
    def frontier(self) -> int:
        """Positions below it may be computed: they precede every span that still needs a source."""
        if self.mode is Mode.DECODE:
            return self.num_tokens if self.has_kv else self.num_computed
        for state in self.spans:
            if state.needs_source or state.arriving:
                return state.span.start + state.cached
        return self.num_tokens

    @property
    def reach(self) -> int:
        """Positions below it may be computed ahead of the admission of sources that are still arriving."""
        for state in self.spans:
            if state.needs_source:
                return state.span.start + state.cached
        return self.num_tokens

    def slots(self, start: int, stop: int) -> np.ndarray:
        """Page slots of positions [start, stop): int64 [stop - start], read-only."""
        return self._slots[start:stop]

    def place(self, blocks: list[int], num_tokens: int, tainted_from: int | None) -> None:
        """Own ``blocks``; the KV of the first ``num_tokens`` positions is in them already (a prefix hit)."""
        self.blocks = blocks
        self.block_table = np.array(blocks, np.int32)
        self._slots = block_slots(self.block_table, self.block_size)
        self.prefix_tokens = self.num_computed = self.num_offered = num_tokens
        self.tainted_from = self._prefix_taint = tainted_from
        for state in self.spans:
            state.cached = min(max(num_tokens - state.span.start, 0), state.span.length)

    def recordable(self, index: int) -> bool:
        """See ``Engine.recordable``."""
        state = self.spans[index]
        if self.reuse is ReuseMode.OFF or state.cached or state.repeated:
            return False
        return self.tainted_from is None or self.tainted_from >= state.span.end

    def give_source(self, index: int, source: Compute | Reuse) -> None:
        """Note the source; the engine holds its extents in ``held`` and ``record``."""
        state = self.spans[index]
        state.source = source
        state.groups = source.groups if isinstance(source, Reuse) else ()
        state.arriving = bool(state.groups)
        state.layers_here = 0
        variant = None
        embed_base = None if source.embedding is None else source.embedding.offset
        if isinstance(source, Compute):
            record_base = None if state.record is None else state.record.offset
            state.work = SpanWork(state.span.start, state.span.length, embed_base=embed_base, record_base=record_base)
        else:
            state.work = SpanWork(
                state.span.start, state.span.length, source.depths, kv_base=source.kv.offset, embed_base=embed_base
            )
            if source.canary is not None and self.watch_from is None and len(self.probes(index)):
                self.watch_from = index
            if source.depths.min() < self.num_layers:
                # From the span's start on, although leading tokens may be recomputed in full: the prefix caches name
                # blocks by what their spans reuse.
                variant = source.kv.variant
                first = state.span.start
                self.tainted_from = first if self.tainted_from is None else min(first, self.tainted_from)
        if self.chain is not None:
            self.chain.set_variant(state.span.index, variant)
        self._count_active()

    def probes(self, index: int) -> np.ndarray:
        """Probe tokens of a reused span that this sequence computes itself: int64, empty if nobody watches."""
        state = self.spans[index]
        if not isinstance(state.source, Reuse) or state.source.canary is None:
            return np.empty(0, np.int64)
        probes = state.source.canary.probes(state.span.length)
        return probes[probes >= state.cached]

    def computed_afresh(self, index: int) -> np.ndarray:
        """Tokens of a reused span that this sequence computes in every layer: int64, ascending."""
        state = self.spans[index]
        assert isinstance(state.source, Reuse)
        return state.cached + np.flatnonzero(state.source.depths[state.cached :] >= self.num_layers)

    def escalate(self, first: int) -> int:
        """Go back to span ``first`` and compute it and everything behind it from encoder output; returns how many
        reused spans that concerns. All their extents must still be held. What lies in the prefix hit stays."""
        escalated = 0
        for index in range(first, len(self.spans)):
            state = self.spans[index]
            if not self.suspicious(index):
                continue
            assert isinstance(state.source, Reuse)
            state.source = replace(state.source, depths=np.full(state.span.length, self.num_layers, np.int32))
            state.escalated = True
            state.why = "canary" if state.deviation is not None and state.deviation > 1 else "earlier span"
            escalated += 1
            if self.chain is not None:
                self.chain.set_variant(state.span.index, None)
        self._go_back(first)
        return escalated

    def retry(self, first: int, chosen: dict[int, np.ndarray]) -> None:
        """Go back to span ``first`` for a second pass in which tokens ``chosen`` int64 [c] of some suspicious spans are
        computed in every layer besides what was. All extents must still be held. Pictures that nobody had are not
        computed again: the pass before did so, over what was reused before them, and what they lack is what a little
        more or less of that would have brought them."""
        for index, tokens in chosen.items():
            source = self.spans[index].source
            assert isinstance(source, Reuse)
            depths = source.depths.copy()
            depths[tokens] = self.num_layers
            self.spans[index].source = replace(source, depths=depths)
        self._go_back(first)
        for state in self.spans[first:]:
            if isinstance(state.source, Compute) and not state.cached:
                nothing = np.zeros(state.span.length, np.int32)
                state.work = SpanWork(state.span.start, state.span.length, nothing, in_place=True)
        self._count_active()

    def suspicious(self, index: int) -> bool:
        """True for a reused span that can be computed after all when it, or one before it, has alarmed."""
        source = self.spans[index].source
        return isinstance(source, Reuse) and source.canary is not None and source.embedding is not None

    def _go_back(self, first: int) -> None:
        """Compute span ``first`` and everything behind it once more, as the sources say now."""
        for state in self.spans[first:]:
            source, span = state.source, state.span
            if source is None:
                continue
            embed_base = None if source.embedding is None else source.embedding.offset
            if isinstance(source, Reuse) and (source.depths < self.num_layers).any():
                kv = source.kv if state.shifted is None else state.shifted
                state.work = SpanWork(span.start, span.length, source.depths, kv.offset, embed_base)
            else:
                state.work = SpanWork(span.start, span.length, embed_base=embed_base)
        self.num_computed = max(self.spans[first].span.start, self.prefix_tokens)
        self._find_taint()
        self._count_active()

    def admit(self, index: int, kv: Extent, embedding: Extent | None) -> None:
        """What was arriving is all there, and valid: ``kv`` is it, and ``embedding`` if that was arriving too."""
        state = self.spans[index]
        assert isinstance(state.source, Reuse) and state.work is not None
        state.source = replace(state.source, kv=kv, groups=())
        state.work.kv_base = kv.offset
        state.held.append(kv)
        if embedding is not None:
            state.source = replace(state.source, embedding=embedding, rows_arrive=False)
            state.work.embed_base = embedding.offset
            state.held.append(embedding)
        state.arriving, state.layers_here = False, self.num_layers

    def withdraw(self, index: int) -> None:
        """A source that was still arriving is lost: the span needs another one."""
        state = self.spans[index]
        state.source = state.work = None
        state.arriving, state.layers_here = False, 0
        self.watch_from = next((i for i in range(len(self.spans)) if len(self.probes(i))), None)
        if self.chain is not None:
            self.chain.set_variant(state.span.index, None)
        self._find_taint()
        self._count_active()

    def drop_record(self, index: int) -> Extent | None:
        """Stop recording a span; returns the extent to abort."""
        state = self.spans[index]
        record, state.record = state.record, None
        if state.work is not None:
            state.work.record_base = None
        return record

    def chunk(self, budget: int) -> ChunkWork | None:
        """The next positions to compute with at most ``budget`` rows; None if nothing can be computed."""
        return None if self.streaming else self._chunk(self.frontier, budget)

    def stream(self, budget: int) -> ChunkWork | None:
        """The next positions to compute while the source of one of their spans is still arriving; None if there are
        none, or if other requests may wait for a record among them."""
        chunk = self._chunk(self.reach, budget)
        if chunk is None or not self.arriving(chunk) or any(span.record_base is not None for span in chunk.spans):
            return None
        return chunk

    def arriving(self, chunk: ChunkWork) -> list[SpanState]:
        """Spans of the chunk whose source is not admitted yet."""
        return [s for s in self.spans if s.arriving and s.span.start < chunk.end and s.span.end > chunk.start]

    def _chunk(self, stop: int, budget: int) -> ChunkWork | None:
        start = self.num_computed
        if start >= stop or budget < 1:
            return None
        if start >= self.num_prompt:
            return self._work(start, stop)
        limit = min(stop, self.num_prompt)
        end = min(int(np.searchsorted(self._active, self._active[start] + budget, side="right")) - 1, limit)
        if self._active[end] == self._active[start]:
            return None  # reused tokens alone: they are copied together with the next computed one
        return self._work(start, end)

    def active_rows(self, chunk: ChunkWork) -> int:
        """Rows that a prompt's chunk computes."""
        return int(self._active[chunk.end] - self._active[chunk.start])

    def stops_short(self, chunk: ChunkWork) -> bool:
        """True if the chunk ends only because a source is missing, and nobody but this request can wait for it."""
        if chunk.end == self.num_prompt or chunk.end not in (self.frontier, self.reach):
            return False
        return all(span.record_base is None for span in chunk.spans)

    def offer(self, prefix: PrefixCache, num_computed: int) -> None:
        """Let other sequences start with the blocks that are full once ``num_computed`` positions are computed."""
        if self.watch_from is not None:  # until its canary is read, nobody knows what will be in these blocks
            num_computed = min(num_computed, self.spans[self.watch_from].span.start)
        if self.private_from is not None:
            num_computed = min(num_computed, self.private_from)
        stop = num_computed // self.block_size * self.block_size
        if self.chain is None or stop <= self.num_offered:
            return
        self.chain.extend(self.tokens[self.chain.num_tokens : stop])
        prefix.insert(self.chain, self.blocks, start=self.num_offered, stop=stop, tainted_from=self.tainted_from)
        self.num_offered = stop

    def append(self, token_id: int) -> None:
        """An answer token: known, not computed."""
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        self.num_generated += 1

    def waiting_rows(self) -> int:
        """Rows still to be computed of the prompt, as far as sources are known (others count in full)."""
        if self.mode is Mode.DECODE:
            return 0
        return int(self._active[-1] - self._active[min(self.num_computed, self.num_prompt)])

    def cached_tokens(self) -> int:
        """Prompt tokens that are not computed in full."""
        reused = 0
        for state in self.spans:
            if isinstance(state.source, Reuse):
                reused += int((state.source.depths[state.cached :] < self.num_layers).sum())
        return self.prefix_tokens + reused

    def _work(self, start: int, end: int) -> ChunkWork:
        works = [s.work for s in self.spans if s.work is not None and s.span.start < end and s.span.end > start]
        sample = end == self.num_tokens
        return ChunkWork(self.tokens, self.positions, self.block_table, start, end, sample, works, self._slots)

    def _find_taint(self) -> None:
        """Where approximation begins, from what the spans' sources are now."""
        approximated = [
            state.span.start
            for state in self.spans
            if isinstance(state.source, Reuse) and (state.source.depths < self.num_layers).any()
        ]
        if self._prefix_taint is not None:
            approximated.append(self._prefix_taint)
        self.tainted_from = min(approximated, default=None)

    def _count_active(self) -> None:
        active = np.ones(self.num_prompt, np.int64)
        for state in self.spans:
            if isinstance(state.source, Reuse):
                active[state.span.start : state.span.end] = state.source.depths > 0
            elif state.work is not None and state.work.in_place:
                active[state.span.start : state.span.end] = 0
        np.cumsum(active, out=self._active[1:])
