"""A fetch that somebody waits for with a pass in hand: the destination is known before the holder is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fetch_pair import KV, SIZE, Pair, refused, virtual
from virtual_cluster import key, variant

from vlcache_dist.errors import LayoutMismatch, ObjectGone, StoreFull, VLCacheError, WorkerLost
from vlcache_dist.kv.object_store import Extent


class Listening(Pair):
    """A reader that notes what it is told, and when: ``told`` holds calls to the holder, extents and groups."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told: list[Any] = []
        self.extents: list[Extent] = []
        self.begun = asyncio.Event()

    async def listen(self) -> Extent:
        def begun(extent: Extent) -> None:
            self.extents.append(extent)
            self.begun.set()
            self.told.append(("begun", list(self.cluster.calls)))

        def landed(extent: Extent, start: int, stop: int) -> None:
            self.told.append((start, stop))

        return await self.fetch(on_group=landed, on_extent=begun)


@virtual
async def test_the_destination_is_told_before_the_holder_is_asked() -> None:
    pair = Listening()
    extent = await pair.listen()
    assert pair.told[0] == ("begun", ["Hello"])
    assert pair.extents == [extent] and pair.right(extent)
    pair.reader.store.unpin(extent)
    await pair.settle()


@virtual
async def test_only_the_variant_that_was_promised_will_do() -> None:
    """The holder has recorded the key anew: the extent that somebody lays a pass out for is named after the old one."""
    pair = Listening()
    pair.holder.store.discard(pair.object)
    pair.holder.put(KV, key(1), variant(2), SIZE)
    await refused(pair.listen(), ObjectGone)
    assert len(pair.extents) == 1 and pair.reader.store.lookup(KV, key(1)) is None
    plain = await pair.fetch()
    assert plain.variant == variant(2), "who does not compute ahead takes any variant"
    pair.reader.store.unpin(plain)
    await pair.settle()


@pytest.mark.parametrize("trouble", ["gone", "size", "dead"])
def test_a_holder_that_refuses_leaves_nothing_behind(trouble: str) -> None:
    @virtual
    async def scenario() -> None:
        pair = Listening()
        expected: type[VLCacheError] = ObjectGone
        if trouble == "gone":
            pair.holder.store.discard(pair.object)
        elif trouble == "size":
            pair.holder.store.discard(pair.object)
            pair.holder.put(KV, key(1), variant(1), SIZE // 2)
            expected = LayoutMismatch
        else:
            pair.reader.store.unpin(await pair.fetch())  # hands are shaken
            pair.reader.store.clear()
            await pair.holder.die()
            expected = WorkerLost
        await refused(pair.listen(), expected)
        assert len(pair.extents) == 1 and pair.told[1:] == []
        await asyncio.sleep(3.0)
        stats = pair.reader.store.stats()
        assert (stats.filling, stats.quarantined, stats.pinned) == (0, 0, 0)

    scenario()


@virtual
async def test_without_room_the_holder_is_not_asked() -> None:
    pair = Listening()
    filling = []
    while True:
        try:
            filling.append(pair.reader.store.begin(KV, key(9), variant(9), SIZE, 0.0))
        except StoreFull:
            break
    await refused(pair.listen(), StoreFull)
    assert "Acquire" not in pair.cluster.calls and not pair.extents
    for extent in filling:
        pair.reader.store.abort(extent)
    await pair.settle()


@virtual
async def test_a_caller_that_leaves_while_the_holder_is_asked() -> None:
    pair = Listening()
    asking = asyncio.create_task(pair.listen())
    await pair.begun.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await pair.settle()


@virtual
async def test_a_listener_that_fails_leaves_nothing_behind() -> None:
    pair = Pair()

    def begun(extent: Extent) -> None:
        raise ArithmeticError("the engine says no")

    await refused(pair.fetch(on_group=lambda *group: None, on_extent=begun), ArithmeticError)
    assert "Acquire" not in pair.cluster.calls
    await pair.settle()
