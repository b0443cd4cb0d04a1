"""The fetch protocol beside objects, in virtual time: handoffs, and what is measured when two workers meet."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from fetch_pair import KV, SIZE, Pair, refused, virtual
from virtual_cluster import LIMITS, Worker, content, key, variant

from vlcache_dist import wire
from vlcache_dist.errors import ChecksumMismatch, LeaseLost, StoreFull, TransferFailed
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.transfer.memory import Fault

WARY = replace(LIMITS, verify_on_host=True)


def stage(worker: Worker, ttl_s: float) -> tuple[Extent, wire.Lease]:
    extent = worker.store.stage(SIZE, worker.cluster.loop.time())
    worker.view(extent).copy_(content(KV, key(7), variant(7), SIZE))
    worker.store.commit(extent)
    return extent, worker.holder.lease(extent, ttl_s)


@virtual
async def test_a_handoff_is_read_and_stays_the_holders() -> None:
    pair = Pair()
    packed, lease = stage(pair.holder, 0.8)
    extent = await pair.reader.fetcher.fetch_staging(pair.holder.id, "holder", lease)
    assert torch.equal(pair.reader.view(extent), content(KV, key(7), variant(7), SIZE))
    pair.reader.store.abort(extent)
    assert pair.holder.store.release(lease.lease_id, lease.generation, pair.cluster.loop.time())
    pair.holder.store.discard(packed)
    await pair.settle()


@virtual
async def test_a_handoff_whose_lease_ended_is_not_admitted() -> None:
    pair = Pair()
    packed, lease = stage(pair.holder, 0.2)
    await asyncio.sleep(0.3)  # in the decode worker's queue
    await refused(pair.reader.fetcher.fetch_staging(pair.holder.id, "holder", lease), LeaseLost)
    pair.holder.store.discard(packed)
    await pair.settle()


@virtual
async def test_a_handoff_that_arrives_damaged_from_another_host_is_not_admitted() -> None:
    for same_host, limits, wary in ((False, LIMITS, True), (True, LIMITS, False), (True, WARY, True)):
        pair = Pair(Fault(corrupt=True), same_host=same_host, limits=limits)
        packed, lease = stage(pair.holder, 5.0)
        fetch = pair.reader.fetcher.fetch_staging(pair.holder.id, "holder", lease)
        if wary:
            await refused(fetch, ChecksumMismatch)
        else:
            pair.reader.store.abort(await fetch)
        assert pair.holder.store.release(lease.lease_id, lease.generation, pair.cluster.loop.time())
        pair.holder.store.discard(packed)
        await pair.settle()


@virtual
async def test_meeting_a_peer_leaves_nothing_behind() -> None:
    pair = Pair(Fault(delay_s=0.1))
    link = await pair.reader.fetcher.introduce(pair.holder.id, "holder", (400, 1000, 1 << 30))
    assert link.points == (pytest.approx((400, 0.1)), pytest.approx((1000, 0.1))), "what does not fit is left out"
    assert link.bytes_per_s == pytest.approx(10_000, rel=0.01) and link.slow
    assert pair.reader.fetcher.reads == 6
    await pair.settle()


@virtual
async def test_peers_are_measured_one_at_a_time() -> None:
    """Together their READs would be more than may be under way at once."""
    pair = Pair(Fault(delay_s=0.1))
    others = [pair.cluster.start(f"holder-{number}", host="h0") for number in range(3)]
    size = pair.reader.store.max_quarantine // 2 * pair.reader.layout.itemsize
    links = await asyncio.gather(*(pair.reader.fetcher.introduce(o.id, o.address, (size,)) for o in others))
    assert [link.points for link in links] == [(pytest.approx((size, 0.1)),)] * 3
    await pair.settle()


@virtual
async def test_what_requests_leave_no_room_for_is_not_measured() -> None:
    pair = Pair()
    store, now = pair.reader.store, pair.cluster.loop.time()
    size, itemsize = store.max_quarantine // 2, pair.reader.layout.itemsize
    arriving = store.stage(store.max_quarantine - size // 2, now, transfer=True)
    link = await pair.reader.fetcher.introduce(pair.holder.id, "holder", (400, size * itemsize))
    assert [nbytes for nbytes, _ in link.points] == [400], "that is what may be under way beside it"
    with pytest.raises(StoreFull):
        await pair.reader.fetcher.introduce(pair.holder.id, "holder", (size * itemsize,))
    store.abort(arriving)
    await pair.settle()


@virtual
async def test_a_pair_below_the_floor_can_be_refused() -> None:
    """The link reads 1,000 bytes in 0.1 s."""
    for floor, refuse in ((1e3, True), (1e6, False), (1e6, True)):
        pair = Pair(Fault(delay_s=0.1), limits=replace(LIMITS, floor=floor, refuse_slow=refuse))
        link = await pair.reader.fetcher.introduce(pair.holder.id, "holder", (1000,))
        assert link.slow == (floor == 1e6)
        if link.slow and refuse:
            assert pair.reader.fetcher.refuses(pair.holder.id)
            await refused(pair.fetch(), TransferFailed)
        else:
            assert not pair.reader.fetcher.refuses(pair.holder.id)
            extent = await pair.fetch()
            assert pair.right(extent)
            pair.reader.store.unpin(extent)
        await pair.settle()


@virtual
async def test_a_probe_evicts_nothing() -> None:
    pair = Pair()
    for index in range(10, 30):
        pair.reader.put(KV, key(index), variant(index), SIZE)
    before = pair.reader.store.stats()
    link = await pair.reader.fetcher.introduce(pair.holder.id, "holder")
    assert link.points[0][0] <= before.largest_free * 4
    assert pair.reader.store.stats() == before
