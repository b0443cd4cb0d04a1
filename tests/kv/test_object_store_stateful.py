"""Random interleavings of everything a store can be asked, against a model that paints the arena element by element.

Invariants of the design that are checked here: only committed objects are seen (1); what is pinned, leased, fenced
or quarantined is never handed out (2); a lease counts only while it lives, in its generation (3); elements are
conserved and drain to zero (5).
"""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from vlcache_dist.errors import LeaseLost, ObjectGone, StoreFull
from vlcache_dist.kv.object_store import Extent, LeaseGrant, ObjectStore
from vlcache_dist.types import ObjectKind

MAX_LEASE, FENCE = 6.0, 8.0
MAX_QUARANTINE = 24


@dataclass(eq=False)
class Held:
    """What the model knows of an extent. ``visible``: committed and neither evicted nor discarded."""

    extent: Extent
    size: int
    transfer: bool
    state: str = "filling"
    pins: int = 0
    leases: dict[int, tuple[int, float]] = field(default_factory=dict)
    not_before: float = -math.inf
    generations: set[int] = field(default_factory=set)  # that ended by force


class StoreMachine(RuleBasedStateMachine):
    filling = Bundle("filling")
    committed = Bundle("committed")
    quarantined = Bundle("quarantined")
    pins = Bundle("pins")
    leases = Bundle("leases")

    @initialize(alignment=st.sampled_from([1, 4]))
    def start(self, alignment):
        self.alignment = alignment
        self.store = ObjectStore(
            64, alignment=alignment, max_quarantine=MAX_QUARANTINE, max_lease_s=MAX_LEASE, fence_s=FENCE
        )
        self.now = 0.0
        self.held: dict[int, Held] = {}
        self.order: list[int] = []  # visible objects, least recently used first
        self.seen_leases: set[int] = set()

    # -- the model ------------------------------------------------------------------------------------------------

    def pass_time(self):
        for held in list(self.held.values()):
            for lease_id, (generation, expires_at) in list(held.leases.items()):
                if expires_at <= self.now:
                    del held.leases[lease_id]
                    held.generations.add(generation)
                    held.not_before = max(held.not_before, self.now + FENCE)
            self.settle(held)

    def settle(self, held, *, at_once=False):
        """Forget an extent that the store may have freed, at once or when time passes."""
        if held.state != "quarantined" or held.pins or held.leases:
            return
        if held.not_before == -math.inf or (not at_once and held.not_before <= self.now):
            del self.held[held.extent.id]

    def touch(self, extent):
        if extent.id in self.order:
            self.order.remove(extent.id)
            self.order.append(extent.id)

    def hide(self, held):
        if held.extent.id in self.order:
            self.order.remove(held.extent.id)

    def evictable(self, held):
        return held.extent.id in self.order and not held.pins and not held.leases and held.not_before <= self.now

    def largest_possible_hole(self):
        blocked = [False] * 64 + [True]
        for held in self.held.values():
            if not self.evictable(held):
                blocked[held.extent.offset : held.extent.offset + held.size] = [True] * held.size
        best = run = 0
        for element in blocked:
            run = 0 if element else run + 1
            best = max(best, run)
        return best

    def is_visible(self, extent):
        return extent.id in self.held and self.held[extent.id].state == "committed"

    # -- what happens ---------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 5.0, 9.0]), call=st.booleans())
    def wait(self, seconds, call):
        self.now += seconds
        if call:
            before = {i: set(h.leases) for i, h in self.held.items()}
            lost = {e.id for e in self.store.expire(self.now)}
            self.pass_time()
            after = {i: set(h.leases) for i, h in self.held.items()}
            assert lost == {i for i, leases in before.items() if leases - after.get(i, set())}

    @rule(
        target=filling,
        kind=st.sampled_from([ObjectKind.KV, ObjectKind.EMBEDDING, ObjectKind.STAGING]),
        key=st.sampled_from([b"a" * 32, b"b" * 32, b"c" * 32]),
        variant=st.sampled_from([b"v" * 16, b"w" * 16]),
        elements=st.integers(1, 30),
        transfer=st.booleans(),
    )
    def begin(self, kind, key, variant, elements, transfer):
        self.pass_time()
        size = -(-elements // self.alignment) * self.alignment
        at_risk = sum(h.size for h in self.held.values() if h.transfer)
        possible = self.largest_possible_hole()
        try:
            if kind is ObjectKind.STAGING:
                extent = self.store.stage(elements, self.now, transfer=transfer)
            else:
                extent = self.store.begin(kind, key, variant, elements, self.now, transfer=transfer)
        except StoreFull:
            assert size > possible or (transfer and at_risk + size > MAX_QUARANTINE)
            return None
        assert not transfer or at_risk + size <= MAX_QUARANTINE
        gone = [i for i in self.order if i not in {e.id for e in self.store.objects()}]
        for extent_id in gone:
            assert self.evictable(self.held[extent_id])
            self.order.remove(extent_id)
            del self.held[extent_id]
        for other in self.held.values():
            a, b = other.extent.offset, other.extent.offset + other.size
            assert b <= extent.offset or extent.offset + size <= a, f"{extent} overlaps {other}"
        assert extent.id not in self.held and extent.elements == elements
        self.held[extent.id] = Held(extent, size, transfer)
        return extent

    @rule(target=committed, extent=consumes(filling), pin=st.booleans())
    def commit(self, extent, pin):
        if extent is None:
            return None
        held = self.held[extent.id]
        named = (extent.kind, extent.key, extent.variant)
        twins = [
            h for i in self.order if (h := self.held[i]) and (h.extent.kind, h.extent.key, h.extent.variant) == named
        ]
        result = self.store.commit(extent, pin=pin)
        if twins:
            assert result == twins[0].extent
            del self.held[extent.id]
            held = twins[0]
            self.touch(result)
        else:
            assert result == extent
            held.state, held.transfer = "committed", False
            if extent.kind is not ObjectKind.STAGING:
                self.order.append(extent.id)
        if pin:
            self.store.unpin(result)
        return result

    @rule(extent=consumes(filling))
    def abort(self, extent):
        if extent is not None:
            self.store.abort(extent)
            del self.held[extent.id]

    @rule(target=quarantined, extent=consumes(filling), seconds=st.sampled_from([math.inf, 1.0, 4.0]))
    def quarantine(self, extent, seconds):
        if extent is None:
            return None
        held = self.held[extent.id]
        if not held.transfer:
            with pytest.raises(ValueError):
                self.store.quarantine(extent)
            self.store.abort(extent)
            del self.held[extent.id]
            return None
        self.store.quarantine(extent, self.now + seconds)
        held.state, held.not_before = "quarantined", self.now + seconds
        return extent

    @rule(extent=consumes(quarantined))
    def release_quarantine(self, extent):
        if extent is not None:
            self.store.release_quarantine(extent)
            self.held.pop(extent.id, None)

    @rule(
        target=committed,
        kind=st.sampled_from([ObjectKind.KV, ObjectKind.EMBEDDING]),
        key=st.sampled_from([b"a" * 32, b"b" * 32, b"c" * 32]),
        variant=st.sampled_from([None, b"v" * 16, b"w" * 16]),
    )
    def lookup(self, kind, key, variant):
        fitting = [
            e
            for i in self.order
            if ((e := self.held[i].extent).kind, e.key) == (kind, key) and variant in (None, e.variant)
        ]
        found = self.store.lookup(kind, key, variant)
        assert found == (fitting[-1] if fitting else None)
        if found is not None:
            self.touch(found)
        return found

    @rule(target=pins, extent=committed)
    def pin(self, extent):
        if extent is None:
            return None
        if not self.is_visible(extent):
            with pytest.raises(ObjectGone):
                self.store.pin(extent)
            return None
        self.store.pin(extent)
        self.held[extent.id].pins += 1
        return extent

    @rule(extent=consumes(pins))
    def unpin(self, extent):
        if extent is not None:
            self.store.unpin(extent)
            held = self.held[extent.id]
            held.pins -= 1
            self.settle(held, at_once=True)

    @rule(extent=committed)
    def discard(self, extent):
        if extent is None:
            return
        self.store.discard(extent)
        if self.is_visible(extent):
            held = self.held[extent.id]
            self.hide(held)
            held.state = "quarantined"
            self.settle(held, at_once=True)

    @rule(target=leases, extent=committed, ttl=st.sampled_from([1.0, 3.0, 100.0]))
    def lease(self, extent, ttl):
        if extent is None:
            return None
        self.pass_time()
        if not self.is_visible(extent):
            with pytest.raises(ObjectGone):
                self.store.lease(extent, ttl, self.now)
            return None
        grant = self.store.lease(extent, ttl, self.now)
        held = self.held[extent.id]
        assert grant.extent == extent and grant.ttl_s == min(ttl, MAX_LEASE)
        assert grant.lease_id not in self.seen_leases
        assert grant.generation not in held.generations, "forced expiry changes the generation"
        self.seen_leases.add(grant.lease_id)
        held.leases[grant.lease_id] = (grant.generation, self.now + grant.ttl_s)
        self.touch(extent)
        return grant

    @rule(grant=leases, ttl=st.sampled_from([0.5, 3.0, 100.0]))
    def renew(self, grant, ttl):
        if grant is None:
            return
        self.pass_time()
        held = self.alive(grant)
        if held is None:
            with pytest.raises(LeaseLost):
                self.store.renew(grant.lease_id, grant.generation, ttl, self.now)
            return
        renewed = self.store.renew(grant.lease_id, grant.generation, ttl, self.now)
        expires_at = max(held.leases[grant.lease_id][1], self.now + min(ttl, MAX_LEASE))
        held.leases[grant.lease_id] = (grant.generation, expires_at)
        assert renewed.ttl_s == pytest.approx(expires_at - self.now) and renewed.generation == grant.generation

    @rule(grant=leases, wrong=st.booleans())
    def release(self, grant, wrong):
        if grant is None:
            return
        self.pass_time()
        held = self.alive(grant)
        if wrong:
            assert not self.store.release(grant.lease_id, grant.generation + 1, self.now)
            return
        assert self.store.release(grant.lease_id, grant.generation, self.now) == (held is not None)
        if held is not None:
            del held.leases[grant.lease_id]
            self.settle(held, at_once=True)

    def alive(self, grant: LeaseGrant) -> Held | None:
        held = self.held.get(grant.extent.id)
        return held if held is not None and grant.lease_id in held.leases else None

    # -- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def agrees(self):
        if not hasattr(self, "store"):
            return
        self.store.validate()
        assert [e.id for e in self.store.objects()] == self.order
        stats = self.store.stats()
        for state in ("filling", "committed"):
            assert getattr(stats, state) == sum(h.size for h in self.held.values() if h.state == state)
        assert stats.free + stats.filling + stats.committed + stats.quarantined == stats.total == 64
        assert stats.pinned == sum(h.size for h in self.held.values() if h.pins)
        retracted = {e.id for e in self.store.take_evictions()}
        assert not retracted & set(self.order)

    def teardown(self):
        if not hasattr(self, "store"):
            return
        for held in list(self.held.values()):
            if held.state == "filling":
                self.store.abort(held.extent)
            elif held.state == "quarantined" and held.transfer:
                self.store.release_quarantine(held.extent)
            else:
                for _ in range(held.pins):
                    self.store.unpin(held.extent)
                self.store.discard(held.extent)
        self.store.expire(self.now + MAX_LEASE)
        self.store.expire(self.now + MAX_LEASE + FENCE)
        self.store.validate()
        assert self.store.stats().free == 64, "idle and yet something is held"
        assert self.store.stats().num_leases == 0


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=300, stateful_step_count=50, deadline=None, derandomize=True)
