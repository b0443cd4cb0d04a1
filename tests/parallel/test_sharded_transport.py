"""A READ of several shards is one READ: done when all are, failed with the first, terminal with the last."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import msgspec
import pytest
import torch
from shard_threads import Threads

from vlcache_dist.errors import LayoutMismatch, TransferFailed, TransferTimeout
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.parallel.build import open_arenas
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.parallel.transport import ShardedTransfer, ShardedTransport
from vlcache_dist.transfer.base import PeerInfo, Piece
from vlcache_dist.transfer.memory import Fault, MemoryNetwork, MemoryTransport

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, hidden=16, dtype="float32", model="none", tp_size=2)
ELEMENTS = 256


class Part:
    def __init__(self) -> None:
        self.future: Future[None] = Future()
        self.terminal = False


def test_done_with_the_last_part_failed_with_the_first_terminal_with_all() -> None:
    a, b = Part(), Part()
    whole = ShardedTransfer([a, b])
    a.terminal = True
    a.future.set_result(None)
    assert not whole.future.done() and not whole.terminal
    b.terminal = True
    b.future.set_result(None)
    assert whole.future.result(0) is None and whole.terminal
    a, b = Part(), Part()
    whole = ShardedTransfer([a, b])
    b.future.set_exception(TransferTimeout("late"))
    with pytest.raises(TransferTimeout, match="late"):
        whole.future.result(0)
    a.terminal = True
    a.future.set_result(None)
    assert not whole.terminal, "the late part may still write"
    b.terminal = True
    assert whole.terminal


class Workers:
    """Two workers of two ranks on one in-memory network; ``fault`` is what happens to READs by a rank."""

    def __init__(self) -> None:
        self.faults: dict[int, Fault] = {}
        self.network = MemoryNetwork(lambda reader, peer, pieces: self.faults.get(reader.layout.tp_rank, Fault()))
        self.arenas: dict[str, torch.Tensor] = {}
        self.groups: list[ShardGroup] = []
        self.reader, self.holder = (self._worker(name) for name in ("reader", "holder"))

    def _worker(self, name: str) -> ShardedTransport:
        group = ShardGroup(Threads(make_transport=self._transport), 2)
        self.groups.append(group)
        arena = torch.empty(ELEMENTS)
        peers = open_arenas(group, arena, LAYOUT, name)
        return ShardedTransport(self._transport(name, arena, LAYOUT), group, peers)

    def _transport(self, worker_id: str, arena: torch.Tensor, layout: KVLayout) -> MemoryTransport:
        self.arenas[worker_id] = arena.fill_(len(self.arenas))
        return MemoryTransport(self.network, worker_id, arena, layout)

    def read(self, deadline_s: float = 5.0) -> ShardedTransfer:
        return self.reader.read(self.holder.info, [Piece(64, 128, 256)], deadline_s)

    def close(self) -> None:
        for transport in (self.reader, self.holder):
            transport.close()
        for group in self.groups:
            group.close()
        self.network.close()


@pytest.fixture
def workers() -> Any:
    made = Workers()
    yield made
    made.close()


def test_every_rank_reads_the_same_range_of_its_peer(workers: Workers) -> None:
    workers.reader.connect(workers.holder.info)
    workers.arenas["holder"].copy_(torch.arange(ELEMENTS))
    workers.arenas["holder/1"].copy_(-torch.arange(ELEMENTS))
    transfer = workers.read()
    transfer.future.result(5)
    assert transfer.terminal
    for rank, sign in (("", 1), ("/1", -1)):
        assert torch.equal(workers.arenas[f"reader{rank}"][32:96], sign * torch.arange(16.0, 80.0))
    assert workers.reader.checksum(128, 256) == workers.holder.checksum(64, 256)
    assert len(workers.reader.checksum(0, 64)) == 32


def test_a_follower_that_dies_ends_its_part_and_the_worker(workers: Workers) -> None:
    workers.reader.connect(workers.holder.info)
    workers.faults[1] = Fault(drop=True)
    transfer = workers.read()
    workers.groups[0].sides[0].cut()
    with pytest.raises(TransferFailed, match="shard 1 is gone"):
        transfer.future.result(5)
    assert transfer.terminal, "its arena is gone with it"
    assert workers.groups[0].lost is not None
    with pytest.raises(TransferFailed, match="shard 1 is gone"):
        workers.reader.checksum(0, 64)


def test_peers_that_do_not_fit_are_refused_before_any_shard_is_connected(workers: Workers) -> None:
    other = msgspec.structs.replace(workers.holder.info, layout=msgspec.structs.replace(LAYOUT, tp_size=4))
    with pytest.raises(LayoutMismatch, match="tp_size: 2 here, 4 there"):
        workers.reader.connect(other)
    lone: PeerInfo = msgspec.structs.replace(workers.holder.info, shards=())
    with pytest.raises(LayoutMismatch, match="names 1 shards, and this worker has 2"):
        workers.reader.connect(lone)
    swapped = msgspec.structs.replace(
        workers.holder.info, shards=(msgspec.structs.replace(workers.holder.info, shards=()),)
    )
    with pytest.raises(LayoutMismatch, match=r"shard 1: .*tp_rank: 1 here, 0 there"):
        workers.reader.connect(swapped)
    with pytest.raises(TransferFailed, match="not connected"):
        workers.read().future.result(5)


def test_a_range_outside_the_arena_is_refused(workers: Workers) -> None:
    workers.reader.connect(workers.holder.info)
    with pytest.raises(ValueError, match="leaves an arena"):
        workers.reader.read(workers.holder.info, [Piece(0, 0, ELEMENTS * 4 + 4)], 1.0)
