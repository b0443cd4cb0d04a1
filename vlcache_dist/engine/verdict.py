"""What becomes of a request when its canaries have been read: released, computed once more, or computed in full.

::

    first pass ──calm──> released
        └─alarm─> second pass (if the plan has one) ──answer unmoved──> released, its blocks kept private
                      ├─answer moved, and there are passes left─> once more, compared with the second
                      └─moved, or what was lent does not fit, or there is none─> from the alarming span on everything,
                                                                                 from encoder output

Nothing of it is released before its verdict. See ``reuse.canary`` and docs/reuse.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from vlcache_dist.engine.api import Mode, Reuse
from vlcache_dist.engine.recheck import attended, last_row, moved
from vlcache_dist.engine.runner import Runner
from vlcache_dist.engine.sequence import Doubt, Sequence
from vlcache_dist.engine.sources import SourceBook
from vlcache_dist.engine.watch import Look, Watched
from vlcache_dist.errors import StoreFull
from vlcache_dist.kv.object_store import ObjectStore
from vlcache_dist.types import TokenLogprobs

Drawn = tuple[int, TokenLogprobs | None]  #: a token, and its logprobs if the request asked for them
Ratios = Iterable[np.ndarray]  #: fp32 [layer, probe] per watched span


class Verdicts:
    """Of one engine. ``counters``: ``spans_watched``, ``spans_rechecked``, ``spans_escalated`` are counted."""

    def __init__(self, runner: Runner, store: ObjectStore, sources: SourceBook, counters: Counter[str]) -> None:
        self._runner = runner
        self._store = store
        self._sources = sources
        self._counters = counters

    def look(self, sequence: Sequence) -> Look:
        """Compare, behind the pass under way, the probes of all watched spans with what they were reused from; in a
        second pass all that is computed of the suspicious spans with what was lent to them."""
        watched, doubt = [], sequence.doubt
        for index, state in enumerate(sequence.spans):
            if not isinstance(state.source, Reuse):
                continue
            kv, tokens = state.source.kv, sequence.probes(index)
            if doubt is not None:
                if index < doubt.first or not sequence.suspicious(index):
                    continue  # judged already, by the first pass
                kv, tokens = state.shifted or kv, sequence.computed_afresh(index)
            if len(tokens):
                slots = sequence.slots(state.span.start, state.span.end)[tokens]
                watched.append(Watched(index, state.span.length, kv, tokens, slots))
        return Look(self._runner, watched)

    def settle(self, sequence: Sequence, spans: Iterable[Watched], ratios: Ratios, drawn: Drawn, now: float) -> bool:
        """Judge a pass that has ``drawn`` the first token. True: the token is not to be released, and the sequence goes
        back to the first span that alarmed; False: what the spans held is let go."""
        if sequence.doubt is None:
            back = self._first(sequence, spans, ratios, drawn, now)
        else:
            back = self._second(sequence, sequence.doubt, ratios)
        if not back:
            sequence.watch_from = None
            for state in sequence.spans:
                self._sources.unhold(state, keep_kv=sequence.mode is Mode.PREFILL)
        return back

    def _first(self, sequence: Sequence, spans: Iterable[Watched], ratios: Ratios, drawn: Drawn, now: float) -> bool:
        first, again = None, None
        for watched, seen in zip(spans, ratios, strict=True):
            state = sequence.spans[watched.index]
            if not isinstance(state.source, Reuse) or state.source.canary is None:
                continue
            state.deviation = state.source.canary.excess(seen)
            self._counters["spans_watched"] += 1
            if state.deviation > 1 and first is None:
                first, again = watched.index, state.source.canary.again
        if first is None:
            return False
        if again is None:
            self._escalate(sequence, first, drawn)
            return True
        logprobs, paid = last_row(self._runner, sequence, again.layer)
        for index in range(first, len(sequence.spans)):
            self._lend(sequence, index, now)
        sequence.doubt = Doubt(first, again, logprobs, drawn, again.passes)
        sequence.retry(first, attended(sequence, first, again, paid))
        return True

    def _second(self, sequence: Sequence, doubt: Doubt, ratios: Ratios) -> bool:
        sequence.doubt = None
        if not doubt.again.fits(np.concatenate(list(ratios), 1).mean(1)):
            self._escalate(sequence, doubt.first, doubt.drawn)
            return True
        after, paid = last_row(self._runner, sequence, doubt.again.layer)
        if moved(doubt.logprobs, after) > doubt.again.limit:
            if doubt.passes > 1:
                sequence.doubt = replace(doubt, logprobs=after, passes=doubt.passes - 1)
                sequence.retry(doubt.first, attended(sequence, doubt.first, doubt.again, paid))
                return True
            self._escalate(sequence, doubt.first, doubt.drawn)
            return True
        sequence.private_from = sequence.spans[doubt.first].span.start
        for index in range(doubt.first, len(sequence.spans)):
            if sequence.suspicious(index):
                sequence.spans[index].why = "rechecked"
                self._counters["spans_rechecked"] += 1
        return False

    def _lend(self, sequence: Sequence, index: int, now: float) -> None:
        """Let a suspicious span's stale tokens follow its probes, in a copy of its KV."""
        state, probes = sequence.spans[index], sequence.probes(index)
        if not sequence.suspicious(index) or not isinstance(state.source, Reuse) or not len(probes):
            return
        kv, at = state.source.kv, state.span.start + probes
        try:
            copy = self._store.stage(kv.elements, now)
        except StoreFull:
            return  # its own KV must do; the second verdict sees what comes of it
        try:
            slots = sequence.slots(state.span.start, state.span.end)[probes]
            self._runner.lend((kv.offset, state.span.length), probes, slots, sequence.positions[:, at], copy)
        except BaseException:
            self._store.abort(copy)
            raise
        state.shifted = self._store.commit(copy, pin=True)
        state.held.append(state.shifted)

    def _escalate(self, sequence: Sequence, first: int, drawn: Drawn) -> None:
        sequence.watch_from = None
        self._counters["spans_escalated"] += sequence.escalate(first)
        for state in sequence.spans[:first]:
            self._sources.unhold(state, keep_kv=sequence.mode is Mode.PREFILL)
        sequence.discarded = drawn
