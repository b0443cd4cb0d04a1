"""The fetch protocol in virtual time: what is admitted, what is shared, what every failure leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from fetch_pair import KV, SIZE, TOKENS, Pair, refused, virtual
from virtual_cluster import LAYOUT, LIMITS, Worker, content, key, variant

from vlcache_dist import wire
from vlcache_dist.errors import (
    CacheError,
    ChecksumMismatch,
    DeadlineExceeded,
    LayoutMismatch,
    LeaseLost,
    ObjectGone,
    ProtocolError,
    StoreFull,
    TransferFailed,
    TransferTimeout,
    WorkerLost,
)
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.transfer.fetch import FetchLimits
from vlcache_dist.transfer.memory import Fault
from vlcache_dist.types import ObjectKind


@virtual
async def test_an_object_is_admitted_pinned_under_the_holders_variant() -> None:
    pair = Pair()
    extent = await pair.fetch(meta="what the directory is told")
    assert pair.right(extent)
    assert (extent.kind, extent.key, extent.variant, extent.meta) == (
        KV,
        key(1),
        variant(1),
        "what the directory is told",
    )
    assert pair.reader.store.stats().pinned == extent.elements
    assert pair.reader.store.lookup(KV, key(1), variant(1)) == extent
    pair.reader.store.unpin(extent)
    assert pair.cluster.calls == ["Hello", "Acquire", "Release"]
    assert (pair.reader.fetcher.reads, pair.reader.fetcher.bytes_read) == (1, SIZE * 4)
    await pair.settle()


@virtual
async def test_hands_are_shaken_once() -> None:
    pair = Pair()
    pair.reader.store.unpin(await pair.fetch())
    pair.reader.store.clear()
    pair.reader.store.unpin(await pair.fetch())
    assert pair.cluster.calls.count("Hello") == 1
    pair.reader.fetcher.forget_peer(pair.holder.id)
    pair.reader.store.clear()
    pair.reader.store.unpin(await pair.fetch())
    assert pair.cluster.calls.count("Hello") == 2


@virtual
async def test_layers_arrive_in_groups_in_order() -> None:
    layer_bytes = SIZE * 4 // LAYOUT.num_layers
    for group_bytes, expected in (
        (1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2 * layer_bytes, [(0, 2), (2, 4)]),
        (3 * layer_bytes, [(0, 4)]),
        (1 << 30, [(0, 4)]),
    ):
        pair = Pair(limits=FetchLimits(group_bytes=group_bytes))
        groups: list[tuple[int, int]] = []

        def on_group(extent: Extent, start: int, stop: int, pair: Pair = pair, groups: Any = groups) -> None:
            offset, length = LAYOUT.layer_range(TOKENS, start, stop)
            here = pair.reader.view(extent)[offset : offset + length]
            assert torch.equal(here, content(KV, key(1), variant(1), SIZE)[offset : offset + length])
            groups.append((start, stop))

        extent = await pair.fetch(on_group=on_group)
        assert groups == expected
        assert pair.right(extent)


@virtual
async def test_simultaneous_fetches_share_one_read() -> None:
    pair = Pair(Fault(delay_s=0.1))
    late: list[tuple[int, int]] = []
    first = asyncio.create_task(pair.fetch())
    await asyncio.sleep(0.05)
    second = asyncio.create_task(pair.fetch(on_group=lambda extent, a, b: late.append((a, b))))
    third = asyncio.create_task(pair.fetch())
    extents = await asyncio.gather(first, second, third)
    assert len(set(extents)) == 1
    assert pair.reader.fetcher.reads == 1
    assert late == [(0, 4)]
    for extent in extents:
        assert pair.reader.store.stats().pinned
        pair.reader.store.unpin(extent)
    await pair.settle()


@virtual
async def test_a_shared_fetch_outlives_callers_that_leave() -> None:
    pair = Pair(Fault(delay_s=0.2))
    first, second = asyncio.create_task(pair.fetch()), asyncio.create_task(pair.fetch())
    await asyncio.sleep(0.1)
    first.cancel()
    extent = await second
    assert first.cancelled()
    assert pair.right(extent)
    pair.reader.store.unpin(extent)
    await pair.settle()


@virtual
async def test_a_fetch_that_nobody_waits_for_is_dropped() -> None:
    pair = Pair(Fault(delay_s=0.2))
    tasks = [asyncio.create_task(pair.fetch()) for _ in range(2)]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)
    assert pair.reader.store.stats().quarantined, "the READ still writes"
    await pair.settle()
    extent = await pair.fetch()
    assert pair.right(extent)


@virtual
async def test_a_shared_failure_reaches_all_callers() -> None:
    pair = Pair(Fault(delay_s=0.1, error=True))
    results = await asyncio.gather(*(pair.fetch() for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [TransferFailed] * 3
    assert pair.reader.fetcher.failures == {"TransferFailed": 1}
    await pair.settle()


@virtual
async def test_a_failed_fetch_gives_its_lease_back() -> None:
    for fault in (Fault(error=True), Fault(corrupt=True), Fault(delay_s=2.0)):
        pair = Pair(fault)
        await refused(pair.fetch(), CacheError)
        await asyncio.sleep(0.01)
        assert pair.holder.store.stats().num_leases == 0


@virtual
async def test_a_caller_that_leaves_while_the_lease_is_granted_leaves_none_behind() -> None:
    pair = Pair()
    grant = pair.holder.holder.acquire
    granted = asyncio.Event()

    async def slow(message: wire.Acquire) -> wire.Lease:
        lease = await grant(message)
        granted.set()
        await asyncio.sleep(0.01)  # the reply's way
        return lease

    pair.holder.holder.acquire = slow  # type: ignore[method-assign]
    fetching = asyncio.create_task(pair.fetch())
    await granted.wait()
    fetching.cancel()
    await asyncio.sleep(0.1)
    assert fetching.cancelled()
    assert pair.holder.store.stats().num_leases == 0
    await pair.settle()


@virtual
async def test_a_prefix_is_a_staging_extent() -> None:
    pair = Pair()
    made = pair.holder.put(ObjectKind.EMBEDDING, key(2), variant(2), 80)
    extent = await pair.reader.fetcher.fetch(pair.holder.holds(made), ObjectKind.EMBEDDING, key(2), 80, prefix=24)
    assert (extent.kind, extent.elements) == (ObjectKind.STAGING, 24)
    assert torch.equal(pair.reader.view(extent), content(ObjectKind.EMBEDDING, key(2), variant(2), 80)[:24])
    assert pair.reader.fetcher.bytes_read == 24 * 4
    pair.reader.store.unpin(extent)
    pair.reader.store.discard(extent)
    await pair.settle()


@virtual
async def test_what_has_no_layers_is_one_group() -> None:
    """Encoder output, whole or its first rows: where it will be is known before, and that it is there, when it is."""
    for prefix in (None, 24):
        pair = Pair(Fault(delay_s=0.1))
        made = pair.holder.put(ObjectKind.EMBEDDING, key(2), variant(2), 80)
        told: list[object] = []
        fetching = asyncio.create_task(
            pair.reader.fetcher.fetch(
                pair.holder.holds(made),
                ObjectKind.EMBEDDING,
                key(2),
                80,
                prefix=prefix,
                on_group=lambda extent, a, b, told=told: told.append((extent, a, b)),  # type: ignore[misc]
                on_extent=told.append,
            )
        )
        await asyncio.sleep(0.05)
        assert len(told) == 1
        extent = await fetching
        assert told == [extent, (extent, 0, 4)]
        pair.reader.store.unpin(extent)
        if prefix:
            pair.reader.store.discard(extent)
        await pair.settle()


@virtual
async def test_a_damaged_prefix_is_noticed_too() -> None:
    pair = Pair(Fault(corrupt=True))
    made = pair.holder.put(ObjectKind.EMBEDDING, key(2), variant(2), 80)
    fetch = pair.reader.fetcher.fetch(pair.holder.holds(made), ObjectKind.EMBEDDING, key(2), 80, prefix=24)
    await refused(fetch, ChecksumMismatch)
    await pair.settle()


@virtual
async def test_damage_between_hosts_is_noticed() -> None:
    pair = Pair(Fault(corrupt=True))
    await refused(pair.fetch(), ChecksumMismatch)
    assert pair.reader.store.lookup(KV, key(1)) is None
    await pair.settle()


@virtual
async def test_within_a_host_checksums_are_by_policy() -> None:
    trusting = Pair(Fault(corrupt=True), same_host=True)
    assert not trusting.right(await trusting.fetch())
    wary = Pair(Fault(corrupt=True), same_host=True, limits=FetchLimits(verify_on_host=True))
    await refused(wary.fetch(), ChecksumMismatch)


@virtual
async def test_a_verified_copy_passes_its_checksum_on() -> None:
    """A copy that is damaged in the reader's memory later is not taken for good by the next reader."""
    pair = Pair()
    extent = await pair.fetch()
    pair.reader.arena[extent.offset] += 1.0
    third = pair.cluster.start("third", host="h2")
    await refused(third.fetcher.fetch(pair.reader.holds(extent), KV, key(1), SIZE), ChecksumMismatch)


@virtual
async def test_checksums_follow_the_object_not_the_place() -> None:
    pair = Pair()
    pair.reader.store.unpin(await pair.fetch())
    pair.holder.store.discard(pair.object)
    again = pair.holder.put(KV, key(1), variant(2), SIZE)
    assert again.offset == pair.object.offset
    extent = await pair.fetch()
    assert extent.variant == variant(2)
    assert pair.right(extent)


@virtual
async def test_a_timed_out_destination_is_kept_until_nothing_writes_it() -> None:
    pair = Pair()
    pair.holder.freeze()
    pair.holder.awake.set()  # its control plane still answers: the worst case
    started = pair.cluster.loop.time()
    await refused(pair.fetch(), TransferTimeout)
    assert pair.cluster.loop.time() - started < LIMITS.transfer_s + 0.01
    await asyncio.sleep(100.0)
    assert pair.reader.store.stats().quarantined == SIZE
    taken = pair.reader.put(KV, key(9), variant(9), SIZE)
    pair.holder.thaw()
    await pair.settle()
    assert torch.equal(pair.reader.view(taken), content(KV, key(9), variant(9), SIZE))
    assert pair.right(await pair.fetch())


@virtual
async def test_quarantine_is_bounded() -> None:
    pair = Pair(Fault(drop=True))
    outcomes = [await refused(pair.fetch(), CacheError) for _ in range(30)]
    assert "under way or quarantined" in outcomes[-1]
    stats = pair.reader.store.stats()
    assert SIZE < stats.quarantined <= stats.total // 2
    pair.cluster.network.kill(pair.holder.id)
    await pair.settle()


@virtual
async def test_the_deadline_counts_from_when_the_lease_was_asked_for() -> None:
    """A slow answer to Acquire leaves less of the lease for the READ."""
    pair = Pair(Fault(delay_s=0.65), limits=FetchLimits(lease_s=1.0, transfer_s=0.9, control_s=2.0))
    pair.cluster.rpc_delay = lambda: 0.2
    await refused(pair.fetch(), TransferTimeout)
    await pair.settle()


@virtual
async def test_an_expired_lease_is_not_admitted() -> None:
    pair = Pair(Fault(delay_s=0.4))
    fetch = asyncio.create_task(pair.fetch())
    await asyncio.sleep(0.2)
    pair.holder.store.expire(pair.cluster.loop.time() + 100)
    assert "ended while it was read" in await refused(_await(fetch), LeaseLost)
    await pair.settle()


@virtual
async def test_an_object_discarded_while_it_is_read_stays_in_place() -> None:
    pair = Pair(Fault(delay_s=0.4))
    fetch = asyncio.create_task(pair.fetch())
    await asyncio.sleep(0.1)
    pair.holder.store.discard(pair.object)
    other = pair.holder.put(KV, key(3), variant(3), SIZE)
    assert other.offset != pair.object.offset
    extent = await fetch
    assert pair.right(extent)
    pair.reader.store.unpin(extent)
    await pair.settle()


@virtual
async def test_a_generation_that_is_over_is_refused() -> None:
    pair = Pair()
    grant = pair.holder.store.lease(pair.object, 1.0, 0.0)
    stale = wire.Renew(grant.lease_id, grant.generation + 1, 1.0)
    await refused(pair.cluster.call("holder", stale, timeout_s=1.0), LeaseLost)
    wrong = await pair.cluster.call("holder", wire.Release(grant.lease_id, grant.generation + 1), timeout_s=1.0)
    assert wrong == wire.Released(False)
    right = await pair.cluster.call("holder", wire.Release(grant.lease_id, grant.generation), timeout_s=1.0)
    assert right == wire.Released(True)


@virtual
async def test_a_stale_hint_costs_a_round_trip() -> None:
    pair = Pair()
    pair.holder.store.discard(pair.object)
    await refused(pair.fetch(), ObjectGone)
    recomputed = pair.holder.put(KV, key(1), variant(2), SIZE)
    await refused(pair.fetch(exact_variant=True), ObjectGone)
    extent = await pair.fetch()
    assert extent.variant == recomputed.variant
    assert pair.right(extent)
    pair.reader.store.unpin(extent)
    await pair.settle()


@virtual
async def test_another_layout_is_refused_on_either_side() -> None:
    pair = Pair()
    other = msgspec.structs.replace(LAYOUT, dtype="bfloat16", tp_size=2)
    stranger = pair.cluster.start("stranger", layout=other)
    said = await refused(stranger.fetcher.fetch(pair.hint, KV, key(1), SIZE), LayoutMismatch)
    assert "dtype: 'float32' here, 'bfloat16' there; tp_size: 1 here, 2 there" in said
    acquire = wire.Acquire(reader="x#1", key=key(1), kind=KV, layout=other)
    assert "tp_size" in await refused(pair.cluster.call("holder", acquire, timeout_s=1.0), LayoutMismatch)


@virtual
async def test_another_size_is_refused() -> None:
    pair = Pair()
    await refused(pair.reader.fetcher.fetch(pair.hint, KV, key(1), SIZE - 32), LayoutMismatch)
    await pair.settle()


@virtual
async def test_a_peer_that_restarted_under_its_address_is_another_peer() -> None:
    pair = Pair()
    await pair.holder.die()
    await refused(pair.fetch(), WorkerLost)
    successor = pair.cluster.start("holder")
    assert "where holder#1 was" in await refused(pair.fetch(), ObjectGone)
    pair.hint = successor.holds(successor.put(KV, key(1), variant(5), SIZE))
    assert pair.right(await pair.fetch())


@virtual
async def test_a_peer_that_restarts_between_handshake_and_read() -> None:
    """Its address answers, the lease is granted, but the bytes would come from the dead one's arena."""
    pair = Pair()
    pair.reader.store.unpin(await pair.fetch())
    pair.reader.store.clear()
    await pair.holder.die()
    successor = pair.cluster.start("holder")
    successor.put(KV, key(1), variant(5), SIZE)
    await refused(pair.fetch(), TransferFailed)
    assert pair.reader.store.lookup(KV, key(1)) is None


@virtual
async def test_a_peer_that_dies_while_it_is_read() -> None:
    pair = Pair(Fault(delay_s=0.4))
    fetch = asyncio.create_task(pair.fetch())
    await asyncio.sleep(0.2)
    await pair.holder.die()
    await refused(_await(fetch), TransferFailed)
    assert pair.reader.store.stats().free == pair.reader.store.stats().total


@virtual
async def test_a_holder_that_says_nothing() -> None:
    pair = Pair()
    pair.holder.freeze()
    await refused(pair.fetch(), DeadlineExceeded)
    pair.holder.thaw()
    await pair.settle()


@virtual
async def test_garbage_from_a_holder_is_refused() -> None:
    for garbage in (
        {"offset": 1 << 40},
        {"offset": -4},
        {"nbytes": SIZE * 4 + 4},
        {"ttl_s": -1.0},
        {"ttl_s": float("nan"), "checksum": b"x"},
        {"checksum": None},
    ):
        pair = Pair()

        def tamper(reply: wire.Message, garbage: dict[str, Any] = garbage) -> wire.Message:
            return msgspec.structs.replace(reply, **garbage) if isinstance(reply, wire.Lease) else reply

        pair.cluster.tamper = tamper
        await refused(pair.fetch(), CacheError)
        await pair.settle()
    pair = Pair()
    pair.cluster.tamper = lambda reply: wire.Ok()
    await refused(pair.fetch(), ProtocolError)


@virtual
async def test_no_room() -> None:
    pair = Pair()
    tight = pair.cluster.start("tight", elements=SIZE - 64)
    await refused(tight.fetcher.fetch(pair.hint, KV, key(1), SIZE), StoreFull)
    await pair.settle()


@virtual
async def test_a_callback_that_fails_fails_the_fetch() -> None:
    pair = Pair()

    def on_group(extent: Extent, start: int, stop: int) -> None:
        raise ArithmeticError("the engine says no")

    await refused(pair.fetch(on_group=on_group), ArithmeticError)
    await pair.settle()


@virtual
async def test_a_group_that_is_late_fails_the_whole() -> None:
    delays = iter([0.1, 0.1, 5.0, 0.1])
    pair = Pair(limits=FetchLimits(lease_s=1.0, transfer_s=0.5, group_bytes=1))
    pair.cluster.network.script = lambda reader, peer, pieces: Fault(delay_s=next(delays))
    seen: list[int] = []
    await refused(pair.fetch(on_group=lambda extent, a, b: seen.append(a)), TransferTimeout)
    assert seen == [0, 1]
    assert pair.reader.store.stats().quarantined == SIZE
    await asyncio.sleep(5.0)
    await pair.settle()


@virtual
async def test_a_bad_question_is_the_callers_fault() -> None:
    for limits in ({"lease_s": 5.0, "transfer_s": 5.0}, {"group_bytes": 0}):
        with pytest.raises(ValueError):
            FetchLimits(**limits)  # type: ignore[arg-type]


# -- staging ----------------------------------------------------------------------------------------------------


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
async def test_meeting_a_peer_leaves_nothing_behind() -> None:
    pair = Pair(Fault(delay_s=0.1))
    link = await pair.reader.fetcher.introduce(pair.holder.id, "holder", (400, 1000, 1 << 30))
    assert link.points == (pytest.approx((400, 0.1)), pytest.approx((1000, 0.1))), "what does not fit is left out"
    assert link.bytes_per_s == pytest.approx(10_000, rel=0.01) and link.slow
    assert pair.reader.fetcher.reads == 6
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


@virtual
async def test_a_group_that_is_late_ends_the_fetch_long_before_the_lease_does() -> None:
    """The link was fast when it was measured; then the holder freezes behind the second group."""
    limits = FetchLimits(lease_s=60.0, transfer_s=50.0, group_bytes=64, group_slack=8.0, group_grace_s=0.2)
    pair = Pair(Fault(delay_s=0.001), limits=limits)
    await pair.reader.fetcher.introduce(pair.holder.id, "holder", (400,))
    seen: list[int] = []

    def on_group(extent: Extent, start: int, stop: int) -> None:
        seen.append(stop)
        if stop == 2:
            pair.holder.freeze()
            pair.holder.awake.set()

    started = pair.cluster.loop.time()
    await refused(pair.fetch(on_group=on_group), TransferTimeout)
    assert seen == [1, 2]
    assert pair.cluster.loop.time() - started < 0.3
    pair.holder.thaw()
    await pair.settle()


@virtual
async def test_who_joins_a_fetch_hears_of_the_same_groups() -> None:
    pair = Pair(Fault(delay_s=0.1), limits=FetchLimits(group_bytes=64))
    heard: dict[str, list[int]] = {"first": [], "second": []}

    def listener(name: str) -> Callable[[Extent, int, int], None]:
        return lambda extent, start, stop: heard[name].append(stop)

    first = asyncio.create_task(pair.fetch(on_group=listener("first")))
    await asyncio.sleep(0.15)
    assert heard["first"] == [1, 2]
    second = asyncio.create_task(pair.fetch(on_group=listener("second")))
    await asyncio.sleep(0)
    assert heard["second"] == [1, 2]
    first.cancel()
    pair.reader.store.unpin(await second)
    assert heard == {"first": [1, 2], "second": [1, 2, 3, 4]}
    assert pair.reader.fetcher.reads == 1
    await pair.settle()


async def _await(task: asyncio.Task[Any]) -> Any:
    return await task


@virtual
async def test_a_caller_that_leaves_while_the_lease_is_released_leaves_none_behind() -> None:
    """The holder has not handled Release yet when the caller's cancellation reaches it."""
    pair = Pair(Fault(delay_s=0.01))
    release, heard = pair.holder.holder.release, asyncio.Event()

    async def slow(message: wire.Release) -> wire.Released:
        heard.set()
        await asyncio.sleep(0.05)
        return await release(message)

    pair.holder.holder.release = slow  # type: ignore[method-assign]
    fetching = asyncio.create_task(pair.fetch())
    await heard.wait()
    fetching.cancel()
    await asyncio.sleep(0.2)
    assert pair.holder.store.stats().num_leases == 0
    await pair.settle()
