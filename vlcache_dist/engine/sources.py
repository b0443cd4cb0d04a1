"""The extents behind spans: what a span's source holds, pins and records, from being given to being let go of."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from vlcache_dist.engine.api import Compute, Event, Mode, RecordDropped, Reuse
from vlcache_dist.engine.sequence import Sequence, SpanState
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.types import ObjectKind, ReuseMode


def layer_edges(groups: tuple[int, ...], num_layers: int) -> bool:
    """True if ``groups`` are the edges of consecutive runs of all layers."""
    return groups[0] == 0 and groups[-1] == num_layers and all(a < b for a, b in pairwise(groups))


class SourceBook:
    """Keeps pins and records of one engine's spans. ``emit`` is told of records that are dropped; ``taken`` counts the
    reused spans."""

    def __init__(self, store: ObjectStore, layout: KVLayout, emit: Callable[[Event], None]) -> None:
        self._store = store
        self._layout = layout
        self._emit = emit
        self.taken = 0

    def check(self, sequence: Sequence, index: int, source: Compute | Reuse) -> None:
        """Raises ValueError for a source that does not fit the span or the request's reuse mode."""
        span, where = sequence.spans[index].span, f"span {index} of {sequence.request_id}"
        if sequence.mode is Mode.DECODE:
            raise ValueError(f"{where}: a DECODE request takes its KV from import_sequence")
        kv = source.record if isinstance(source, Compute) else source.kv
        if kv is not None and (kv.elements != self._layout.kv_elements(span.length) or kv.key != span.key):
            raise ValueError(f"{where}: the KV extent is another one's")
        rows = span.length
        if isinstance(source, Compute):
            if source.record is not None and sequence.reuse is ReuseMode.OFF:
                raise ValueError(f"{where}: reuse=off records nothing")
        else:
            if sequence.reuse is not ReuseMode.APPROX:
                raise ValueError(f"{where}: reuse={sequence.reuse} takes no image KV")
            if source.rows_arrive and not (source.groups and source.embedding):
                raise ValueError(f"{where}: rows arrive only with KV that does")
            if source.groups and not sequence.blocks:
                raise ValueError(f"{where}: a source cannot arrive before its request is admitted")
            if source.groups and not layer_edges(source.groups, self._layout.num_layers):
                raise ValueError(f"{where}: groups {source.groups} are no edges of {self._layout.num_layers} layers")
            if source.depths.shape != (span.length,) or source.depths.max() > self._layout.num_layers:
                raise ValueError(f"{where}: depths {source.depths.shape} do not fit {span.length} tokens")
            recomputed = np.flatnonzero(source.depths > 0)  # of a mask: many times as fast as of integers
            rows = int(recomputed[-1]) + 1 if len(recomputed) else 0
            if source.canary is not None:
                rows = span.length
                if (source.depths[source.canary.probes(rows)] < self._layout.num_layers).any():
                    raise ValueError(f"{where}: the canary's probes must be recomputed in every layer")
        have = 0 if source.embedding is None else source.embedding.elements
        if have < self._layout.embedding_elements(rows):
            raise ValueError(f"{where}: {rows} tokens are computed, the encoder output given has {have} elements")

    def take(self, sequence: Sequence, index: int, source: Compute | Reuse) -> None:
        """The source is the span's from now on: hold it, record what may be recorded, and drop records behind it that
        may not be made any more."""
        state = sequence.spans[index]
        if source.embedding is not None and not (isinstance(source, Reuse) and source.rows_arrive):
            state.held.append(source.embedding)
        if isinstance(source, Reuse):
            if not source.groups:
                state.held.append(source.kv)
            self.taken += 1
        elif source.record is not None:
            if sequence.recordable(index):
                state.record = source.record
            else:
                self._abort_record(sequence.request_id, index, source.record)
        sequence.give_source(index, source)
        if isinstance(source, Reuse):
            for later, other in enumerate(sequence.spans):
                if other.record is not None and not sequence.recordable(later):
                    self.drop_record(sequence, later)

    def give_back(self, request_id: str, index: int, source: Compute | Reuse) -> None:
        """A source that is not needed."""
        if source.embedding is not None and not (isinstance(source, Reuse) and source.rows_arrive):
            self.let_go(source.embedding)
        if isinstance(source, Reuse):
            if not source.groups:
                self.let_go(source.kv)
        elif source.record is not None:
            self._abort_record(request_id, index, source.record)

    def let_go(self, extent: Extent) -> None:
        """Unpin; what was staged for one reader alone is discarded."""
        self._store.unpin(extent)
        if extent.kind is ObjectKind.STAGING:
            self._store.discard(extent)

    def unhold(self, state: SpanState, *, keep_kv: bool) -> None:
        """Let go of what a span holds; ``keep_kv``: not of its KV, which a handoff will name."""
        kept = [extent for extent in state.held if keep_kv and extent.kind is ObjectKind.KV]
        for extent in state.held:
            if extent not in kept:
                self.let_go(extent)
        state.held = kept

    def drop_record(self, sequence: Sequence, index: int) -> None:
        """Stop recording a span, if it is being recorded."""
        record = sequence.drop_record(index)
        if record is not None:
            self._abort_record(sequence.request_id, index, record)

    def _abort_record(self, request_id: str, index: int, record: Extent) -> None:
        self._store.abort(record)
        self._emit(RecordDropped(request_id, index, record.key))
