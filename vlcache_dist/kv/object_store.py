"""The book of a worker's arena: which extent holds which object, who uses it, and when it may be reused.

An extent's life::

    begin ──> FILLING ──commit──> COMMITTED ──evict / discard──> free
                 │ abort                └─ discard while pinned, leased or fenced ─> QUARANTINED ──> free
                 ├──────> free
                 └ quarantine (a READ into it timed out and may still write) ─> QUARANTINED ──> free

Rules the store keeps:

* Only COMMITTED objects are found, leased or announced.
* A pinned or leased extent is neither moved, freed nor overwritten. ``pin`` is for users in this process, ``lease``
  for readers elsewhere, who may die without a word.
* A lease that runs out by force gives the object a new generation and *fences* the extent: the object stays cached,
  but its elements are not reused for ``fence_s``, which is at least the longest lease and so longer than any reader's
  deadline.
* free + filling + committed + quarantined elements are the whole arena, always.

Thread-safe: the engine's thread and the RPC thread both use it, and every method is atomic. No method blocks, calls
back or reads a clock; ``now`` is in seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
import functools
import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from vlcache_dist.errors import ObjectGone, StoreFull
from vlcache_dist.kv.allocator import ExtentAllocator
from vlcache_dist.kv.eviction import choose_victims
from vlcache_dist.kv.leases import LeaseTable
from vlcache_dist.types import ContentKey, ObjectKind, Variant

P = ParamSpec("P")
R = TypeVar("R")


class ExtentState(enum.StrEnum):
    FILLING = "filling"
    COMMITTED = "committed"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Extent:
    """A handle on ``elements`` arena elements from ``offset`` on. ``id`` is never reused, so a handle that outlives
    its extent is recognized. ``key`` and ``variant`` are empty for staging. ``meta`` is the caller's, not read here
    (what an announcement must say, for example)."""

    id: int
    kind: ObjectKind
    key: ContentKey
    variant: Variant
    offset: int
    elements: int
    meta: Any = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """``ttl_s`` may be shorter than asked for. ``checksum`` is what ``commit`` was given."""

    lease_id: int
    generation: int
    extent: Extent
    ttl_s: float
    checksum: bytes | None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Elements unless the name says otherwise. ``pinned`` and ``leased`` are parts of the four states."""

    total: int
    free: int
    filling: int
    committed: int
    quarantined: int
    pinned: int
    leased: int
    largest_free: int
    fragmentation: float
    num_objects: int
    num_leases: int
    num_evictions: int
    num_forced_expiries: int


@dataclass(slots=True)
class _Record:
    extent: Extent
    size: int  # what the allocator gave: ``elements`` rounded up
    transfer: bool
    generation: int = 0  # 0: never committed
    state: ExtentState = ExtentState.FILLING
    pins: int = 0
    leases: set[int] = field(default_factory=set)
    not_before: float = -math.inf  # quarantine or fence: the elements are not reused earlier
    checksum: bytes | None = None

    @property
    def held(self) -> bool:
        return self.pins > 0 or bool(self.leases)


def _locked(method: Callable[Concatenate[ObjectStore, P], R]) -> Callable[Concatenate[ObjectStore, P], R]:
    @functools.wraps(method)
    def locked(self: ObjectStore, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class ObjectStore:
    """Bookkeeping for an arena of ``total`` elements; extents start at multiples of ``alignment`` elements.

    ``max_lease_s`` caps every lease; ``fence_s`` (default: the same) must not be shorter. ``max_quarantine`` bounds
    in elements what timed-out READs can take out of use: destinations of READs under way and in quarantine together
    never exceed it (default: half the arena).
    """

    def __init__(
        self,
        total: int,
        *,
        alignment: int = 1,
        max_quarantine: int | None = None,
        max_lease_s: float = 30.0,
        fence_s: float | None = None,
    ) -> None:
        self.max_lease_s = max_lease_s
        self.fence_s = max_lease_s if fence_s is None else fence_s
        if self.fence_s < max_lease_s:
            raise ValueError(f"fence_s {fence_s} is shorter than max_lease_s {max_lease_s}")
        self._lock = threading.RLock()
        self._allocator = ExtentAllocator(total, alignment)
        self.max_quarantine = self._allocator.total // 2 if max_quarantine is None else max_quarantine
        self._records: dict[int, _Record] = {}
        self._index: dict[tuple[ObjectKind, ContentKey], OrderedDict[Variant, int]] = {}  # most recently used last
        self._lru: OrderedDict[int, None] = OrderedDict()  # committed objects with a key, oldest first
        self._leases = LeaseTable()
        self._wakeups: list[tuple[float, int]] = []  # when a quarantined extent may become free
        self._elements = dict.fromkeys(ExtentState, 0)
        self._at_risk = 0  # elements into which a READ writes or may still write
        self._evicted: list[Extent] = []
        self._next_id = 1
        self._next_generation = 1
        self._num_evictions = 0
        self._num_forced_expiries = 0

    # -- filling ------------------------------------------------------------------------------------------------

    @_locked
    def begin(
        self,
        kind: ObjectKind,
        key: ContentKey,
        variant: Variant,
        elements: int,
        now: float,
        *,
        transfer: bool = False,
        meta: Any = None,
    ) -> Extent:
        """An uninitialized extent in state FILLING, owned by the caller until commit, abort or quarantine.

        ``transfer``: a READ will write into it. Evicts least recently used objects that nobody pins or leases.
        Raises StoreFull, which evicts nothing.
        """
        self._expire(now)
        size = self._allocator.rounded(elements)
        if transfer and self._at_risk + size > self.max_quarantine:
            raise StoreFull(
                f"{elements} elements for a READ: {self._at_risk} are under way or quarantined, "
                f"at most {self.max_quarantine} may be"
            )
        offset = self._allocator.allocate(elements)
        if offset is None:
            self._evict(size, now)
            offset = self._allocator.allocate(elements)
            assert offset is not None, "eviction made a hole that is large enough"
        extent = Extent(self._next_id, kind, key, variant, offset, elements, meta)
        self._next_id += 1
        self._records[extent.id] = _Record(extent, size, transfer)
        self._elements[ExtentState.FILLING] += size
        self._at_risk += size if transfer else 0
        return extent

    def stage(self, elements: int, now: float, *, transfer: bool = False, meta: Any = None) -> Extent:
        """As ``begin``, for an anonymous STAGING extent: never looked up and never evicted, it lives until
        ``abort``, or after ``commit`` until ``discard``."""
        return self.begin(ObjectKind.STAGING, b"", b"", elements, now, transfer=transfer, meta=meta)

    @_locked
    def commit(self, extent: Extent, *, pin: bool = False, checksum: bytes | None = None) -> Extent:
        """Make a filled extent visible; nothing may write into it from here on. Returns the object to use.

        That is another extent if the same variant was committed meanwhile: copies of a variant are equal, and this
        one is freed. Raises ValueError if the extent is not being filled.
        """
        record = self._filling(extent)
        if extent.kind is not ObjectKind.STAGING:
            variants = self._index.setdefault((extent.kind, extent.key), OrderedDict())
            if (twin := variants.get(extent.variant)) is not None:
                self._free(record)
                record = self._records[twin]
                self._touch(record.extent)
                record.pins += pin
                return record.extent
            variants[extent.variant] = extent.id
            self._lru[extent.id] = None
        self._at_risk -= record.size if record.transfer else 0
        self._move(record, ExtentState.COMMITTED)
        record.generation = self._new_generation()
        record.checksum = checksum
        record.pins += pin
        return extent

    @_locked
    def abort(self, extent: Extent) -> None:
        """Give a FILLING extent back; no READ may be under way into it. Raises ValueError."""
        self._free(self._filling(extent))

    @_locked
    def quarantine(self, extent: Extent, until: float = math.inf) -> None:
        """Set a FILLING extent aside whose READ timed out and may still write. It becomes free by
        ``release_quarantine``, or at ``until`` if the transport knows such a time. Raises ValueError if the extent
        is not being filled or was not begun with ``transfer``."""
        record = self._filling(extent)
        if not record.transfer:
            raise ValueError(f"extent {extent.id} was begun without transfer: no READ can be under way into it")
        self._move(record, ExtentState.QUARANTINED)
        record.not_before = until
        self._wake_at(until, record)

    @_locked
    def release_quarantine(self, extent: Extent) -> None:
        """The transfer into a quarantined extent reached a terminal state: free it. An extent that time has freed
        already is ignored; any other state raises ValueError."""
        record = self._records.get(extent.id)
        if record is None:
            return
        if record.state is not ExtentState.QUARANTINED or not self._is_destination(record):
            raise ValueError(f"extent {extent.id} ({record.state}) is not the destination of a timed-out READ")
        self._free(record)

    # -- finding and using --------------------------------------------------------------------------------------

    @_locked
    def lookup(
        self, kind: ObjectKind, key: ContentKey, variant: Variant | None = None, *, pin: bool = False
    ) -> Extent | None:
        """The committed object, of the most recently used variant if none is named; counts as a use."""
        variants = self._index.get((kind, key))
        if not variants:
            return None
        found = variants.get(next(reversed(variants)) if variant is None else variant)
        if found is None:
            return None
        record = self._records[found]
        self._touch(record.extent)
        record.pins += pin
        return record.extent

    @_locked
    def pin(self, extent: Extent) -> None:
        """Keep a committed extent in place until ``unpin``. Raises ObjectGone if it was evicted meanwhile."""
        self._committed(extent).pins += 1

    @_locked
    def unpin(self, extent: Extent) -> None:
        """Raises ValueError if the extent is not pinned."""
        record = self._records.get(extent.id)
        if record is None or record.pins == 0:
            raise ValueError(f"extent {extent.id} is not pinned")
        record.pins -= 1
        self._let_go(record)

    @_locked
    def discard(self, extent: Extent) -> None:
        """Remove a committed object (or staging extent) at once from sight, and free its elements as soon as pins,
        leases and fence allow. An extent that is gone is ignored; one being filled raises ValueError."""
        record = self._records.get(extent.id)
        if record is None or record.state is ExtentState.QUARANTINED:
            return
        if record.state is ExtentState.FILLING:
            raise ValueError(f"extent {extent.id} is being filled: abort or quarantine it")
        self._hide(record)
        self._move(record, ExtentState.QUARANTINED)
        self._let_go(record)

    @_locked
    def clear(self) -> None:
        """Discard every committed object with a key, as a worker does that drains."""
        for extent_id in list(self._lru):
            self.discard(self._records[extent_id].extent)

    # -- leases -------------------------------------------------------------------------------------------------

    @_locked
    def lease(self, extent: Extent, ttl_s: float, now: float) -> LeaseGrant:
        """Let a reader elsewhere read a committed extent. Raises ObjectGone, or ValueError for a ttl of zero."""
        self._expire(now)
        record = self._committed(extent)
        self._touch(extent)
        ttl_s = self._capped(ttl_s)
        lease = self._leases.grant(extent.id, record.generation, now + ttl_s)
        record.leases.add(lease.lease_id)
        return LeaseGrant(lease.lease_id, lease.generation, extent, ttl_s, record.checksum)

    @_locked
    def renew(self, lease_id: int, generation: int, ttl_s: float, now: float) -> LeaseGrant:
        """Extend a lease to ``now + ttl_s``, also of an extent discarded meanwhile. Raises LeaseLost."""
        self._expire(now)
        ttl_s = self._capped(ttl_s)
        lease = self._leases.renew(lease_id, generation, now + ttl_s)
        record = self._records[lease.extent_id]
        return LeaseGrant(lease_id, generation, record.extent, lease.expires_at - now, record.checksum)

    @_locked
    def release(self, lease_id: int, generation: int, now: float) -> bool:
        """End a lease. True if it was alive until now, so that what was read under it may be used."""
        self._expire(now)
        lease = self._leases.release(lease_id, generation)
        if lease is None:
            return False
        record = self._records[lease.extent_id]
        record.leases.remove(lease_id)
        self._let_go(record)
        return True

    @_locked
    def expire(self, now: float) -> list[Extent]:
        """End leases and quarantines whose time is up; every method that takes ``now`` does so too. Returns the
        extents that lost a lease by force in this call and are still there."""
        return self._expire(now)

    # -- reports ------------------------------------------------------------------------------------------------

    @_locked
    def objects(self) -> list[Extent]:
        """Committed objects with a key, least recently used first: what a worker announces after a restart of the
        directory."""
        return [self._records[extent_id].extent for extent_id in self._lru]

    @_locked
    def take_evictions(self) -> list[Extent]:
        """Objects evicted or discarded since the last call and not committed again: to be retracted."""
        evicted, self._evicted = self._evicted, []
        return [e for e in evicted if e.variant not in self._index.get((e.kind, e.key), ())]

    @_locked
    def stats(self) -> StoreStats:
        book, records = self._allocator.stats(), self._records.values()
        return StoreStats(
            total=book.total,
            free=book.free,
            filling=self._elements[ExtentState.FILLING],
            committed=self._elements[ExtentState.COMMITTED],
            quarantined=self._elements[ExtentState.QUARANTINED],
            pinned=sum(record.size for record in records if record.pins),
            leased=sum(record.size for record in records if record.leases),
            largest_free=book.largest_free,
            fragmentation=book.fragmentation,
            num_objects=len(self._lru),
            num_leases=len(self._leases),
            num_evictions=self._num_evictions,
            num_forced_expiries=self._num_forced_expiries,
        )

    @_locked
    def validate(self) -> None:
        """Raise AssertionError unless elements are conserved and all indices agree with the records."""
        self._allocator.validate()
        sizes = dict.fromkeys(ExtentState, 0)
        for record in self._records.values():
            sizes[record.state] += record.size
            assert self._allocator.size_of(record.extent.offset) == record.size
            assert record.size >= record.extent.elements
            assert record.pins >= 0
            if record.state is ExtentState.FILLING:
                assert not record.held, "held before it was committed"
        assert sizes == self._elements, f"{sizes} counted, {self._elements} booked"
        assert sum(sizes.values()) + self._allocator.free_elements == self._allocator.total
        assert self._allocator.stats().num_allocated == len(self._records)
        assert {lease.lease_id for lease in self._leases} == {
            lease_id for record in self._records.values() for lease_id in record.leases
        }
        named = {
            extent_id: record.extent
            for extent_id, record in self._records.items()
            if record.state is ExtentState.COMMITTED and record.extent.kind is not ObjectKind.STAGING
        }
        assert set(self._lru) == set(named)
        indexed = {
            extent_id: (kind, key, variant)
            for (kind, key), variants in self._index.items()
            for variant, extent_id in variants.items()
        }
        assert indexed == {i: (e.kind, e.key, e.variant) for i, e in named.items()}
        assert self._at_risk == sum(r.size for r in self._records.values() if self._is_destination(r))
        assert self._at_risk <= self.max_quarantine

    # -- inside -------------------------------------------------------------------------------------------------

    def _filling(self, extent: Extent) -> _Record:
        record = self._records.get(extent.id)
        if record is None or record.state is not ExtentState.FILLING:
            raise ValueError(f"extent {extent.id} is not being filled")
        return record

    def _committed(self, extent: Extent) -> _Record:
        record = self._records.get(extent.id)
        if record is None or record.state is not ExtentState.COMMITTED:
            raise ObjectGone(f"{extent.kind} object {extent.key.hex()[:16]} is no longer here")
        return record

    def _is_destination(self, record: _Record) -> bool:
        """A READ writes, or may still write, into it: it was never committed."""
        return record.transfer and record.generation == 0

    def _capped(self, ttl_s: float) -> float:
        if not ttl_s > 0:
            raise ValueError(f"a lease of {ttl_s} s")
        return min(ttl_s, self.max_lease_s)

    def _new_generation(self) -> int:
        self._next_generation += 1
        return self._next_generation - 1

    def _touch(self, extent: Extent) -> None:
        if extent.id in self._lru:
            self._lru.move_to_end(extent.id)
            self._index[extent.kind, extent.key].move_to_end(extent.variant)

    def _move(self, record: _Record, state: ExtentState) -> None:
        self._elements[record.state] -= record.size
        self._elements[state] += record.size
        record.state = state

    def _free(self, record: _Record) -> None:
        if self._is_destination(record):
            self._at_risk -= record.size
        self._elements[record.state] -= record.size
        del self._records[record.extent.id]
        self._allocator.free(record.extent.offset)

    def _hide(self, record: _Record) -> None:
        """Take a committed object out of sight and note that it must be retracted."""
        extent = record.extent
        if extent.id not in self._lru:
            return
        del self._lru[extent.id]
        variants = self._index[extent.kind, extent.key]
        del variants[extent.variant]
        if not variants:
            del self._index[extent.kind, extent.key]
        self._evicted.append(extent)

    def _wake_at(self, time: float, record: _Record) -> None:
        if time < math.inf:
            heapq.heappush(self._wakeups, (time, record.extent.id))

    def _let_go(self, record: _Record) -> None:
        """Free a discarded extent that nobody holds any more, after its fence if it has one."""
        if record.state is not ExtentState.QUARANTINED or record.held:
            return
        if record.not_before == -math.inf:
            self._free(record)
        else:
            self._wake_at(record.not_before, record)

    def _expire(self, now: float) -> list[Extent]:
        expired: dict[int, Extent] = {}
        for lease in self._leases.expire(now):
            record = self._records[lease.extent_id]
            record.leases.remove(lease.lease_id)
            record.generation = self._new_generation()
            record.not_before = max(record.not_before, now + self.fence_s)
            self._num_forced_expiries += 1
            self._let_go(record)
            expired[record.extent.id] = record.extent
        while self._wakeups and self._wakeups[0][0] <= now:
            _, extent_id = heapq.heappop(self._wakeups)
            # Nobody holds it, and in quarantine nobody can start to; it may have been released before its time.
            if (waiting := self._records.get(extent_id)) is not None:
                self._free(waiting)
        return list(expired.values())

    def _evict(self, needed: int, now: float) -> None:
        evictable = [r for r in map(self._records.__getitem__, self._lru) if not r.held and r.not_before <= now]
        victims = choose_victims(needed, self._allocator.free_extents(), [(r.extent.offset, r.size) for r in evictable])
        if victims is None:
            raise StoreFull(
                f"no hole of {needed} elements: {self._allocator.free_elements} of {self._allocator.total} are free, "
                f"{sum(r.size for r in evictable)} evictable, {self._elements[ExtentState.QUARANTINED]} quarantined"
            )
        chosen = set(victims)
        for record in evictable:
            if record.extent.offset in chosen:
                self._hide(record)
                self._free(record)
                self._num_evictions += 1
