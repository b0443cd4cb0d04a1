"""What the book of the arena promises, case by case; ``test_object_store_stateful`` covers the interleavings."""

import random
import threading

import pytest

from vlcache_dist.errors import CacheError, LeaseLost, ObjectGone, StoreFull
from vlcache_dist.kv.object_store import ObjectStore
from vlcache_dist.types import ObjectKind

KV, EMBEDDING = ObjectKind.KV, ObjectKind.EMBEDDING
A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))
V, W = b"v" * 16, b"w" * 16


def put(store, key, elements, *, kind=KV, variant=V, now=0.0):
    extent = store.begin(kind, key, variant, elements, now)
    return store.commit(extent)


def test_only_committed_objects_are_found():
    store = ObjectStore(100)
    extent = store.begin(KV, A, V, 10, 0.0, meta="grid")
    assert store.lookup(KV, A) is None and store.objects() == []
    with pytest.raises(ObjectGone):
        store.lease(extent, 1.0, 0.0)
    with pytest.raises(ObjectGone):
        store.pin(extent)
    store.commit(extent, checksum=b"sum")
    assert store.lookup(KV, A) == extent and store.lookup(KV, A).meta == "grid"
    assert store.lookup(KV, A, V) == extent
    assert store.lookup(KV, A, W) is None and store.lookup(EMBEDDING, A) is None and store.lookup(KV, B) is None
    assert store.objects() == [extent]
    assert store.lease(extent, 1.0, 0.0).checksum == b"sum"
    for again in (store.commit, store.abort, store.quarantine):
        with pytest.raises(ValueError):
            again(extent)
    store.validate()


def test_abort_leaves_nothing():
    store = ObjectStore(100)
    store.abort(store.begin(KV, A, V, 100, 0.0, transfer=False))
    assert store.stats().free == 100 and store.take_evictions() == []
    store.validate()


def test_least_recently_used_goes_first_and_is_reported():
    store = ObjectStore(30)
    a, b, c = (put(store, key, 10) for key in (A, B, C))
    store.lookup(KV, A)
    put(store, A, 10, kind=EMBEDDING)
    assert store.lookup(KV, B) is None and store.take_evictions() == [b]
    assert store.lookup(KV, A) == a and store.lookup(KV, C) == c
    assert store.take_evictions() == []
    store.validate()


def test_pins_and_leases_hold():
    store = ObjectStore(30)
    a = put(store, A, 10)
    b = put(store, B, 10)
    store.pin(a)
    grant = store.lease(b, 5.0, 0.0)
    with pytest.raises(StoreFull, match="no hole of 20"):
        store.begin(KV, C, V, 20, 0.0)
    assert store.lookup(KV, A) and store.lookup(KV, B), "a refusal evicts nothing"
    assert store.release(grant.lease_id, grant.generation, 1.0)
    store.begin(KV, C, V, 20, 1.0)
    assert store.take_evictions() == [b]
    with pytest.raises(ValueError):
        store.unpin(b)
    store.unpin(a)
    with pytest.raises(ValueError):
        store.unpin(a)


def test_forced_expiry_changes_the_generation_and_fences_the_extent():
    store = ObjectStore(10, max_lease_s=5.0, fence_s=7.0)
    a = put(store, A, 10)
    late = store.lease(a, 100.0, 0.0)
    assert late.ttl_s == 5.0, "leases are capped"
    assert store.expire(4.9) == []
    other = store.lease(a, 5.0, 4.9)
    assert store.expire(5.0) == [a]
    assert not store.release(late.lease_id, late.generation, 5.0)
    with pytest.raises(LeaseLost):
        store.renew(late.lease_id, late.generation, 1.0, 5.0)
    # The other reader is still good, and the object is still cached, as another generation.
    assert store.lookup(KV, A) == a
    fresh = store.lease(a, 5.0, 5.0)
    assert fresh.generation != late.generation == other.generation
    assert not store.release(fresh.lease_id, late.generation, 5.1), "the generation must match"
    assert store.release(other.lease_id, other.generation, 5.1)
    assert store.release(fresh.lease_id, fresh.generation, 5.1)
    with pytest.raises(StoreFull):
        store.begin(KV, B, V, 10, 11.9)
    store.begin(KV, B, V, 10, 12.0)
    assert store.stats().num_forced_expiries == 1
    store.validate()


def test_a_lease_ends_on_time_even_if_nobody_called_expire():
    store = ObjectStore(10)
    a = put(store, A, 10)
    grant = store.lease(a, 2.0, 0.0)
    assert store.renew(grant.lease_id, grant.generation, 2.0, 1.0).ttl_s == 2.0
    assert store.renew(grant.lease_id, grant.generation, 0.5, 2.0).ttl_s == 1.0, "renewing never shortens"
    assert not store.release(grant.lease_id, grant.generation, 3.0)


def test_discard_waits_for_pins_leases_and_fence():
    store = ObjectStore(10, max_lease_s=5.0)
    a = put(store, A, 10)
    store.pin(a)
    grant = store.lease(a, 5.0, 0.0)
    store.discard(a)
    assert store.lookup(KV, A) is None and store.take_evictions() == [a]
    assert store.stats().quarantined == 10
    store.renew(grant.lease_id, grant.generation, 5.0, 1.0)
    store.unpin(a)
    assert store.stats().quarantined == 10
    store.expire(6.0)
    assert store.stats().quarantined == 10, "forced: fenced until 11"
    store.expire(10.9)
    assert store.stats().quarantined == 10
    store.expire(11.0)
    assert store.stats().free == 10
    store.discard(a)
    store.validate()


def test_discard_frees_at_once_what_nobody_holds():
    store = ObjectStore(10)
    a = put(store, A, 10)
    grant = store.lease(a, 1.0, 0.0)
    store.discard(a)
    assert store.release(grant.lease_id, grant.generation, 0.5)
    assert store.stats().free == 10
    b = put(store, A, 10)
    store.discard(b)
    assert store.stats().free == 10


def test_quarantine_until_the_transfer_is_terminal():
    store = ObjectStore(40, max_quarantine=20)
    a = store.begin(KV, A, V, 10, 0.0, transfer=True)
    b = store.begin(KV, B, V, 10, 0.0, transfer=True)
    with pytest.raises(StoreFull, match="for a READ"):
        store.begin(KV, C, V, 1, 0.0, transfer=True)
    store.quarantine(a)
    store.quarantine(b, until=9.0)
    with pytest.raises(StoreFull, match="for a READ"):
        store.begin(KV, C, V, 11, 9.0, transfer=True)
    c = store.commit(store.begin(KV, C, V, 10, 9.0, transfer=True))
    assert store.stats().quarantined == 10 and store.stats().committed == 10
    store.release_quarantine(b)
    with pytest.raises(ValueError):
        store.release_quarantine(c)
    store.release_quarantine(a)
    store.release_quarantine(a)
    assert store.stats().quarantined == 0
    local = store.begin(KV, A, V, 10, 9.0)
    with pytest.raises(ValueError, match="without transfer"):
        store.quarantine(local)
    store.validate()


def test_quarantine_does_not_bound_local_work():
    store = ObjectStore(40, max_quarantine=10)
    store.quarantine(store.begin(KV, A, V, 10, 0.0, transfer=True))
    put(store, B, 30)
    store.validate()


def test_copies_of_a_variant_are_merged_and_variants_kept_apart():
    store = ObjectStore(100)
    first = store.begin(KV, A, V, 10, 0.0)
    second = store.begin(KV, A, V, 10, 0.0, transfer=True)
    assert store.commit(first) == first
    b = put(store, B, 10)
    assert store.commit(second, pin=True) == first
    assert store.objects() == [b, first], "committing a copy counts as a use"
    store.discard(b)
    assert store.stats().committed == 10 and store.stats().pinned == 10
    store.unpin(first)
    other = put(store, A, 10, variant=W)
    assert store.lookup(KV, A) == other, "the most recently used variant"
    assert store.lookup(KV, A, V) == first
    assert store.lookup(KV, A) == first
    store.discard(first)
    assert store.lookup(KV, A) == other
    store.validate()


def test_committed_again_is_not_retracted():
    store = ObjectStore(10)
    store.discard(put(store, A, 10))
    put(store, A, 10)
    assert store.take_evictions() == []


def test_staging_lives_until_it_is_discarded():
    store = ObjectStore(20)
    staged = store.commit(store.stage(10, 0.0))
    with pytest.raises(StoreFull):
        store.begin(KV, A, V, 20, 0.0)
    grant = store.lease(staged, 5.0, 0.0)
    store.discard(staged)
    assert store.stats().free == 10
    assert store.release(grant.lease_id, grant.generation, 1.0)
    assert store.stats().free == 20
    assert store.take_evictions() == [] and store.objects() == []


def test_clear_empties_the_store():
    store = ObjectStore(30)
    a, b = put(store, A, 10), put(store, B, 10)
    store.pin(a)
    store.clear()
    assert store.take_evictions() == [a, b] and store.stats().free == 20
    store.unpin(a)
    assert store.stats().free == 30
    store.validate()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="fence_s"):
        ObjectStore(10, max_lease_s=5.0, fence_s=4.0)
    store = ObjectStore(10)
    for ttl in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError):
            store.lease(put(store, A, 1), ttl, 0.0)


def test_two_threads():
    """Each thread fills extents with its own mark, checks that nobody else wrote into what it holds, and lets go."""
    store = ObjectStore(200, alignment=4)
    arena = [None] * 200
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for step in range(400):
                key, size = bytes([rng.randrange(6)]) * 32, rng.randrange(1, 60)
                try:
                    extent = store.lookup(KV, key, pin=True)
                    if extent is None:
                        mine = store.begin(KV, key, V, size, float(step))
                        where = slice(mine.offset, mine.offset + mine.elements)
                        arena[where] = [key] * mine.elements
                        if rng.random() < 0.2:
                            store.abort(mine)
                            continue
                        extent = store.commit(mine, pin=True)
                except CacheError:
                    continue
                held = arena[extent.offset : extent.offset + extent.elements]
                assert held == [key] * extent.elements, f"{held} where {key} should be"
                store.unpin(extent)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    store.validate()
    store.clear()
    assert store.stats().free == 200
