"""What is on its way here: what failed is not taken for what is there."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from vlcache_dist import wire
from vlcache_dist.errors import ObjectGone
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.prefill_workers.arrival import Arrival, Incoming
from vlcache_dist.prefill_workers.resolver import SpanResolver
from vlcache_dist.types import ObjectKind

GROUPS = (0, 2, 4)


def extent(number: int, kind: ObjectKind) -> Extent:
    return Extent(number, kind, b"k", b"v", 0, 8)


class Site:
    """A span whose KV and rows are fetched by hand; ``told``: what the engine hears."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.let_go: list[Extent] = []
        self.ends: dict[ObjectKind, asyncio.Future[Extent]] = {}
        self.callbacks: dict[ObjectKind, Any] = {}
        kv, rows = (self.incoming(kind) for kind in (ObjectKind.KV, ObjectKind.EMBEDDING))
        self.arrival = Arrival(wire.Holder("w", "tcp://w", b"v", 8), GROUPS, kv, rows)
        self.arrival.rows_arrive = True

    def incoming(self, kind: ObjectKind) -> Incoming:
        self.ends[kind] = asyncio.get_running_loop().create_future()

        async def fetch(on_group: Any, on_extent: Any) -> Extent:
            self.callbacks[kind] = on_group
            on_extent(extent(len(self.callbacks), kind))
            return await self.ends[kind]

        return Incoming(fetch, self.let_go.append)

    async def on_engine(self, function: Any) -> Any:
        return function(
            SimpleNamespace(
                arrived=lambda request, index, layers: self.told.append(("arrived", layers)),
                revoke=lambda request, index: self.told.append("revoke"),
                admit=lambda request, index, kv, rows: self.told.append(("admit", rows is not None)),
            )
        )

    def land(self, kind: ObjectKind, stop: int) -> None:
        self.callbacks[kind](extent(9, kind), 0, stop)


async def test_layers_wait_for_the_rows() -> None:
    site = Site()
    following = asyncio.create_task(site.arrival.follow(site.on_engine, "r", 0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    site.land(ObjectKind.KV, 2)
    assert site.arrival.layers == 0
    site.land(ObjectKind.EMBEDDING, 4)
    assert site.arrival.layers == 2
    site.land(ObjectKind.KV, 4)
    for kind, end in site.ends.items():
        end.set_result(extent(1, kind))
    assert await following is None
    await asyncio.sleep(0)
    assert ("arrived", 4) in site.told and site.told[-1] == ("admit", True)
    await site.arrival.close()
    assert not site.let_go, "the engine has taken both"


@pytest.mark.parametrize("before", [True, False], ids=["before it is followed", "while it is followed"])
async def test_rows_that_failed_are_not_there(before: bool) -> None:
    """Where they would be is known before their holder is asked: they can fail before a byte has moved."""
    site = Site()
    await asyncio.sleep(0)
    site.land(ObjectKind.KV, 4)
    if before:
        site.ends[ObjectKind.EMBEDDING].set_exception(ObjectGone("evicted"))
        await asyncio.sleep(0.01)
        assert site.arrival.rows.over
    assert site.arrival.layers == 0
    following = asyncio.create_task(site.arrival.follow(site.on_engine, "r", 0))
    await asyncio.sleep(0)
    site.ends[ObjectKind.KV].set_result(extent(1, ObjectKind.KV))
    if not before:
        site.ends[ObjectKind.EMBEDDING].set_exception(ObjectGone("evicted"))
    assert isinstance(await following, ObjectGone)
    assert "revoke" in site.told and not [told for told in site.told if told[0] == "admit" or told == ("arrived", 4)]
    await site.arrival.close()
    assert [e.kind for e in site.let_go] == [ObjectKind.KV]


async def test_what_comes_after_all_is_let_go_even_if_closing_is_cancelled() -> None:
    """A fetch that has ended, and one whose transport is still busy when it is called off."""
    site = Site()
    late: asyncio.Future[Extent] = asyncio.get_running_loop().create_future()

    async def stubborn(on_group: Any, on_extent: Any) -> Extent:
        while not late.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(late)
        return late.result()

    site.arrival.kv = Incoming(stubborn, site.let_go.append)
    await asyncio.sleep(0)
    site.ends[ObjectKind.EMBEDDING].set_result(extent(2, ObjectKind.EMBEDDING))
    await asyncio.sleep(0)
    closing = asyncio.create_task(site.arrival.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    late.set_result(extent(1, ObjectKind.KV))
    await asyncio.sleep(0.01)
    assert {e.kind for e in site.let_go} == {ObjectKind.KV, ObjectKind.EMBEDDING} and len(site.let_go) == 2
    await site.arrival.close()
    assert len(site.let_go) == 2


async def test_a_request_that_ends_before_its_arrival_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is cancelled before its first step runs none of its clean-up."""
    site = Site()
    resolver = object.__new__(SpanResolver)
    resolver._heading, resolver._ahead, resolver._open = None, {}, set()
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def place(index: int, tried: set[bytes]) -> Arrival:
        await gate
        return site.arrival

    monkeypatch.setattr(resolver, "_place", place)
    running = asyncio.create_task(resolver.run([0]))
    await asyncio.sleep(0)
    for kind, end in site.ends.items():
        end.set_result(extent(1, kind))
    gate.set_result(None)
    asyncio.get_running_loop().call_soon(running.cancel)
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0.01)
    assert {e.kind for e in site.let_go} == {ObjectKind.KV, ObjectKind.EMBEDDING} and not site.told
