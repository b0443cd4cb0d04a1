"""What is handed over comes at the same time, whole or not at all."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vlcache_dist import wire
from vlcache_dist.decode_workers import takeover as module
from vlcache_dist.decode_workers.takeover import Takeover
from vlcache_dist.errors import LeaseLost, StoreFull, TransferFailed
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.types import MediaSpan, ObjectKind, ReuseMode, SamplingParams

KEYS = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32  # the first one's KV is here


def extent(kind: ObjectKind, key: bytes = b"") -> Extent:
    return Extent(1, kind, key, b"v", 0, 8)


class Site:
    """Three pictures and shipped rows; ``gates`` by key (b"": the rows) are opened by hand."""

    def __init__(self) -> None:
        self.gates: dict[bytes, asyncio.Future[None]] = {}
        self.asked: list[bytes] = []
        self.given_back: list[bytes] = []
        store = SimpleNamespace(
            lookup=lambda kind, key, variant, pin: extent(kind, key) if key == KEYS[0] else None,
            unpin=lambda e: self.given_back.append(e.key),
            abort=lambda e: self.given_back.append(b""),
        )
        self.node: Any = SimpleNamespace(
            store=store,
            layout=SimpleNamespace(kv_token=2, itemsize=4, tp_size=2),
            fetch=lambda holder, kind, span, exact_variant: self._come(span.key, kind),
            fetch_staging=lambda worker, address, lease: self._come(b"", ObjectKind.STAGING),
        )

    async def _come(self, key: bytes, kind: ObjectKind) -> Extent:
        self.asked.append(key)
        gate = self.gates[key] = asyncio.get_running_loop().create_future()
        await gate
        return extent(kind, key)

    def begin(self) -> Takeover:
        spans = tuple(MediaSpan(key, 4 * i, 3, (1, 4, 4), "image", 0.0, i) for i, key in enumerate(KEYS))
        generation = wire.Generation("r", "", (1,) * 13, spans, SamplingParams(), ReuseMode.APPROX, "none")
        lease = wire.Lease(1, 1, b"v", 0, 100, 9.0)
        named = tuple(wire.HandoffSpan(i, key, b"v") for i, key in enumerate(KEYS))
        handoff = wire.Handoff("w", "tcp://w", "t", 13, ((0, 1),), named, lease)
        message = wire.Decode(generation, 5, handoff, wire.MediaSource("tcp://127.0.0.1:9", "x"), 9.0)
        return Takeover(self.node, message, asyncio.get_running_loop().time() + 9.0)

    async def all_asked(self, count: int = 3) -> None:
        async with asyncio.timeout(2):
            while len(self.asked) < count:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)


async def test_everything_is_asked_for_at_once() -> None:
    site = Site()
    takeover = site.begin()
    await site.all_asked()
    assert set(site.asked) == {KEYS[1], KEYS[2], b""}, "what is here is not fetched"
    for gate in site.gates.values():
        gate.set_result(None)
    handed = await takeover.arrived()
    assert set(handed.kv.objects) == {0, 1, 2} and handed.kv.staging is not None
    assert (handed.moved, handed.images) == ((2 * 3 * 2 * 4 + 100) * 2, 2)
    takeover.take()
    await takeover.close()
    assert not site.given_back


@pytest.mark.parametrize("first", [True, False], ids=["before the others", "behind the others"])
async def test_one_failure_gives_everything_back(first: bool) -> None:
    site = Site()
    takeover = site.begin()
    await site.all_asked()
    if not first:
        site.gates[KEYS[1]].set_result(None)
        site.gates[b""].set_result(None)
        await asyncio.sleep(0)
    site.gates[KEYS[2]].set_exception(LeaseLost("gone"))
    with pytest.raises(TransferFailed, match="gone"):
        await takeover.arrived()
    await takeover.close()
    assert sorted(site.given_back) == ([KEYS[0]] if first else [b"", KEYS[0], KEYS[1]])


async def test_what_nobody_took_is_given_back() -> None:
    """It was all there when the request was given up; closing is cancelled as well."""
    site = Site()
    takeover = site.begin()
    await site.all_asked()
    for gate in site.gates.values():
        gate.set_result(None)
    await takeover.arrived()
    closing = asyncio.create_task(takeover.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await takeover.close()
    assert sorted(site.given_back) == [b"", *KEYS]


async def test_a_request_that_is_given_up_on_the_way() -> None:
    site = Site()
    takeover = site.begin()
    await site.all_asked()
    site.gates[KEYS[1]].set_result(None)
    takeover.drop()
    await takeover.close()
    assert sorted(site.given_back) in ([KEYS[0]], [KEYS[0], KEYS[1]])
    assert all(gate.cancelled() or gate.done() for gate in site.gates.values())


async def test_a_full_store_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM_PAUSE_S", 0.001)
    site = Site()
    takeover = site.begin()
    await site.all_asked()
    site.gates[b""].set_exception(StoreFull("no room"))
    await site.all_asked(6)
    assert site.given_back == [KEYS[0]]
    for gate in site.gates.values():
        if not gate.done():
            gate.set_result(None)
    assert (await takeover.arrived()).images == 2
    monkeypatch.setattr(module, "ROOM_PATIENCE_S", 0.0)
    await takeover.close()
    again = site.begin()
    await site.all_asked(9)
    site.gates[b""].set_exception(StoreFull("no room"))
    with pytest.raises(TransferFailed, match="no room"):
        await again.arrived()
    await again.close()
