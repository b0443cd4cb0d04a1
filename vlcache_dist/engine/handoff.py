"""From one engine's pages to another's. What an image object can rebuild is named, the rest is packed.

Decode rotates an object's K itself and overwrites the rows that were recomputed, so an image that a decode worker
holds is never shipped to it again, and its pages equal the prefill worker's bit for bit.
"""

from __future__ import annotations

import numpy as np

from vlcache_dist.engine.api import DerivableSpan, Export, Import
from vlcache_dist.engine.origins import SlotOrigins
from vlcache_dist.engine.runner import Runner
from vlcache_dist.engine.sequence import Handover, Sequence
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.types import ObjectKind


class HandoverBook:
    """Packs and unpacks sequences; owned by an engine."""

    def __init__(self, store: ObjectStore, runner: Runner, origins: SlotOrigins, layout: KVLayout) -> None:
        self._store = store
        self._runner = runner
        self._origins = origins
        self._layout = layout

    def export(self, sequence: Sequence, now: float) -> Handover:
        """Pack a prefilled sequence. Raises StoreFull, and holds nothing then."""
        num_tokens = sequence.num_computed
        slots = sequence.slots(0, num_tokens)
        shipped = np.ones(num_tokens, bool)
        spans: list[DerivableSpan] = []
        pinned: list[Extent] = []
        for index, state in enumerate(sequence.spans):
            span = state.span
            derived = self._origins.derived(slots[span.start : span.end], span.key)
            if derived is None:
                continue
            variant, copied = derived
            extent = self._store.lookup(ObjectKind.KV, span.key, variant, pin=True)
            if extent is None:
                continue  # evicted meanwhile: nobody could be sure to find it, so its rows travel
            pinned.append(extent)
            shipped[span.start : span.end] = ~copied
            spans.append(DerivableSpan(index, span.key, variant))
        try:
            staging = self._pack(slots[shipped], now)
        except BaseException:
            for extent in pinned:
                self._store.unpin(extent)
            raise
        return Handover(Export(num_tokens, _ranges(shipped), tuple(spans), staging), tuple(pinned))

    def drop_export(self, handover: Handover) -> None:
        """Free staging (once its readers are gone) and pins."""
        for extent in handover.pinned:
            self._store.unpin(extent)
        if handover.export.staging is not None:
            self._store.discard(handover.export.staging)

    def check_import(self, sequence: Sequence, kv: Import) -> None:
        """Raise ValueError unless rows and objects cover the sequence's prompt."""
        if kv.num_tokens != sequence.num_prompt:
            raise ValueError(f"KV of {kv.num_tokens} positions for a prompt of {sequence.num_prompt}")
        covered = np.zeros(kv.num_tokens, bool)
        previous = 0
        for start, stop in kv.rows:
            if not previous <= start < stop <= kv.num_tokens:
                raise ValueError(f"rows {start} to {stop} of {kv.num_tokens} are out of order or out of range")
            covered[start:stop] = True
            previous = stop
        rows = int(covered.sum())
        for index, extent in kv.objects.items():
            if not 0 <= index < len(sequence.spans):
                raise ValueError(f"an object for span {index} of {len(sequence.spans)}")
            span = sequence.spans[index].span
            if extent.key != span.key or extent.elements != self._layout.kv_elements(span.length):
                raise ValueError(f"span {index} and its object do not fit")
            covered[span.start : span.end] = True
        if not covered.all():
            raise ValueError(f"position {int(np.argmin(covered))} is neither shipped nor derivable")
        if (kv.staging is None) != (rows == 0) or (
            kv.staging is not None and kv.staging.elements != self._layout.kv_elements(rows)
        ):
            raise ValueError(f"{rows} rows do not fill the staging extent")

    def fill(self, sequence: Sequence, kv: Import) -> None:
        """Write the pages: objects first, shipped rows over them. On return the extents are no longer read."""
        for index, extent in kv.objects.items():
            span = sequence.spans[index].span
            slots = sequence.slots(span.start, span.end)
            src = extent.offset + np.arange(span.length, dtype=np.int64) * self._layout.kv_row
            tokens = np.full(span.length, span.length, np.int64)
            self._runner.scatter(src, tokens, slots, sequence.positions[:, span.start : span.end])
        if kv.staging is not None:
            rows = np.concatenate([sequence.slots(start, stop) for start, stop in kv.rows])
            self._runner.unpack(kv.staging, rows)
        self._runner.synchronize()

    def drop_import(self, kv: Import) -> None:
        """Give the import's extents back."""
        for extent in kv.objects.values():
            self._store.unpin(extent)
        if kv.staging is not None:
            self._store.abort(kv.staging)

    def _pack(self, slots: np.ndarray, now: float) -> Extent | None:
        if not len(slots):
            return None
        staging = self._store.stage(self._layout.kv_elements(len(slots)), now)
        self._runner.pack(slots, staging)
        return self._store.commit(staging)


def _ranges(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Half-open runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
