"""A fetch through real NIXL from a process that is stopped, killed, or lies."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
import torch
from transport_sites import ARENA_BYTES, LAYOUT, NixlRemote, NixlSite, wait_until, worker_id

from vlcache_dist import wire
from vlcache_dist.errors import ConfigError, TransferFailed, TransferTimeout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.transfer.base import Piece
from vlcache_dist.transfer.fetch import Fetcher, FetchLimits
from vlcache_dist.transfer.nixl import NixlTransport
from vlcache_dist.types import ObjectKind

KEY, VARIANT = b"k" * 32, b"v" * 16
OFFSET = 4096
ELEMENTS = LAYOUT.kv_elements(8192)  # 2 MiB
LIMITS = FetchLimits(lease_s=2.0, transfer_s=0.5, control_s=1.0, group_bytes=512 << 10)


@pytest.fixture
def site() -> Iterator[NixlSite]:
    """TCP, where a stopped peer answers nothing."""
    made = NixlSite("nixl-tcp", "tcp,self")
    yield made
    made.close()


class Reader:
    """A store and a fetcher; the holder's control plane is played here, its arena is the remote's."""

    def __init__(self, site: NixlSite, remote: NixlRemote) -> None:
        self.remote = remote
        self.arena = torch.zeros(ARENA_BYTES // 4)
        self.store = ObjectStore(self.arena.numel())
        self.transport, _ = site.reader(arena=self.arena)
        self.fetcher = Fetcher(self.store, LAYOUT, self.transport, self.call, LIMITS)

    async def call(self, address: str, message: wire.Message, *, timeout_s: float) -> wire.Message:
        match message:
            case wire.Hello():
                return wire.HelloReply(self.remote.info)
            case wire.Acquire():
                return wire.Lease(1, 1, VARIANT, OFFSET, ELEMENTS * 4, message.ttl_s)
            case _:
                return wire.Released(True)

    async def fetch(self, **options: object) -> Extent:
        holder = wire.Holder(self.remote.info.worker_id, "address", VARIANT, ELEMENTS * 4)
        return await self.fetcher.fetch(holder, ObjectKind.KV, KEY, ELEMENTS, **options)  # type: ignore[arg-type]

    def bytes_of(self, extent: Extent) -> torch.Tensor:
        return self.arena[extent.offset : extent.offset + extent.elements].view(torch.uint8)


async def test_stopped_then_killed_in_the_middle_of_a_fetch(site: NixlSite) -> None:
    remote = site.remote()
    expected = remote.fill(OFFSET, ELEMENTS * 4, seed=1)
    reader = Reader(site, remote)
    groups: list[tuple[int, int]] = []
    extent = await reader.fetch(on_group=lambda _, start, stop: groups.append((start, stop)))
    assert torch.equal(reader.bytes_of(extent), expected)
    assert groups == [(0, 1), (1, 2), (2, 3), (3, 4)]
    reader.store.unpin(extent)
    reader.store.discard(extent)

    remote.stop()
    started = time.monotonic()
    with pytest.raises(TransferTimeout):
        await reader.fetch()
    assert LIMITS.transfer_s - 0.05 < time.monotonic() - started < LIMITS.transfer_s + 0.5
    stats = reader.store.stats()
    assert (stats.quarantined, stats.filling, stats.num_objects) == (ELEMENTS, 0, 0)
    # Whoever gets memory now does not get the quarantined one, into which the peer writes when it resumes.
    other = reader.store.begin(ObjectKind.KV, b"o" * 32, VARIANT, ELEMENTS, time.monotonic())
    own = torch.arange(ELEMENTS, dtype=torch.float32)
    reader.arena[other.offset : other.offset + ELEMENTS] = own
    remote.resume()
    await _quarantine_is_empty(reader)
    assert torch.equal(reader.arena[other.offset : other.offset + ELEMENTS], own)
    reader.store.abort(other)

    extent = await reader.fetch()
    assert torch.equal(reader.bytes_of(extent), expected)
    reader.store.unpin(extent)
    reader.store.discard(extent)

    remote.stop()
    threading.Timer(0.15, remote.kill).start()
    started = time.monotonic()
    with pytest.raises((TransferFailed, TransferTimeout)):
        await reader.fetch()
    assert time.monotonic() - started < LIMITS.transfer_s + 0.5
    with pytest.raises((TransferFailed, TransferTimeout)):
        await reader.fetch()
    await _quarantine_is_empty(reader)
    assert reader.store.stats().free == reader.store.stats().total

    remote = reader.remote = site.remote("next")
    expected = remote.fill(OFFSET, ELEMENTS * 4, seed=2)
    assert torch.equal(reader.bytes_of(await reader.fetch()), expected)
    await reader.fetcher.close()


async def _quarantine_is_empty(reader: Reader) -> None:
    end = time.monotonic() + 8.0
    while reader.store.stats().quarantined and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    reader.store.validate()
    assert reader.store.stats().quarantined == 0


def test_a_peer_that_lies_about_itself(site: NixlSite) -> None:
    """Errors, never a crash and never bytes; the honest one can be met afterwards."""
    (ours, _), (theirs, memory) = site.reader(), site.reader()
    info = theirs.info
    for changes in ({"metadata": b""}, {"metadata": b"\x00" * 300}, {"agent": "another#1"}, {"device": "cuda:zz"}):
        with pytest.raises(TransferFailed):
            ours.connect(msgspec.structs.replace(info, **changes))
    for changes in ({"nbytes": 1 << 40}, {"base": info.base + (1 << 30)}, {"device": "cuda:0"}):
        lie = msgspec.structs.replace(info, **changes)
        ours.connect(lie)
        transfer = ours.read(lie, [Piece(min(lie.nbytes - 64, 1 << 30), 0, 64)], 2.0)
        with pytest.raises(TransferFailed):
            transfer.future.result(5)
        assert transfer.terminal, "nothing was posted"
    memory[:64] = torch.arange(64)
    ours.connect(info)
    ours.read(info, [Piece(0, 128, 64)], 2.0).future.result(5)


def test_a_starved_deadline_does_not_stop_the_others(site: NixlSite) -> None:
    """One owner thread serves all: a READ that hangs must not hold back one from another peer."""
    frozen, healthy = site.remote("frozen"), site.remote("healthy")
    transport, arena = site.reader()
    for remote in (frozen, healthy):
        transport.connect(remote.info)
        transport.read(remote.info, [Piece(0, 0, 8)], 5.0).future.result(10)
    expected = healthy.fill(0, 1 << 20, seed=3)
    frozen.stop()
    hanging = transport.read(frozen.info, [Piece(0, 4 << 20, 1 << 20)], 0.4)
    for _ in range(20):
        transport.read(healthy.info, [Piece(0, 0, 1 << 20)], 5.0).future.result(10)
    assert torch.equal(arena[: 1 << 20], expected)
    with pytest.raises(TransferTimeout):
        hanging.future.result(5)
    frozen.resume()
    assert wait_until(lambda: hanging.terminal, 60)


def test_nixl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nixl_cu13", "nixl_cu12", "nixl"):
        monkeypatch.setitem(sys.modules, f"{package}._api", None)
    with pytest.raises(ConfigError, match="pip install nixl-cu13"):
        NixlTransport(worker_id("lonely"), torch.zeros(16), LAYOUT)
    assert not [thread for thread in threading.enumerate() if "lonely" in thread.name]
