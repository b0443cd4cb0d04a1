"""The transport of a tensor-parallel worker: every READ is one per shard, rank r's from the peer's rank r.

All arenas of a worker are laid out alike, so the pieces are the same on every rank, and leases, generations and the
books stay the leader's. A READ is done when every shard's is, fails with the first that fails, and is terminal when
nothing can write into any shard. Encoder output is the same in every shard: each reads it from the one peer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait

import msgspec

from vlcache_dist.errors import LayoutMismatch, TransferFailed
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.transfer.base import PeerInfo, Piece, Transfer, Transport

ANSWER_S = 10.0  #: for a follower to connect, or to compute a checksum


class ShardedTransfer:
    """See ``base.Transfer``."""

    def __init__(self, parts: Sequence[Transfer]) -> None:
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()
        self._parts = tuple(parts)
        self._left = len(self._parts)
        self._lock = threading.Lock()
        for part in self._parts:
            part.future.add_done_callback(self._part_done)

    @property
    def terminal(self) -> bool:
        return all(part.terminal for part in self._parts)

    def _part_done(self, part: Future[None]) -> None:
        error = part.exception()
        with self._lock:
            self._left -= 1
            over = not self.future.done()
            if over and error is not None:
                self.future.set_exception(error)
            elif over and self._left == 0:
                self.future.set_result(None)


class ShardedTransport:
    """The leader's. ``own`` is rank 0's and is closed with it; ``followers`` say where the other ranks' arenas are."""

    def __init__(self, own: Transport, group: ShardGroup, followers: Sequence[PeerInfo]) -> None:
        self.info = msgspec.structs.replace(own.info, shards=tuple(followers))
        self._own = own
        self._group = group
        self._peers: dict[str, PeerInfo] = {}  # by the leader's agent

    def connect(self, peer: PeerInfo) -> None:
        """See ``Transport.connect``: every shard, or LayoutMismatch or TransferFailed."""
        if difference := self.info.layout.difference(peer.layout):
            raise LayoutMismatch(f"{peer.worker_id} keeps other KV than this worker: {difference}")
        if peer.layout.num_layers and len(peer.shards) != self._group.size - 1:
            raise LayoutMismatch(
                f"{peer.worker_id} names {1 + len(peer.shards)} shards, and this worker has {self._group.size}"
            )
        asked = [side.ask(p.Connect(0, _shard(peer, rank))) for rank, side in enumerate(self._group.sides, start=1)]
        self._own.connect(_shard(peer, 0))
        _collect(asked, f"connect to {peer.worker_id}")
        self._peers[peer.agent] = peer

    def disconnect(self, agent: str) -> None:
        """See ``Transport.disconnect``."""
        peer = self._peers.pop(agent, None)
        self._own.disconnect(agent)
        if peer is not None:
            for rank, side in enumerate(self._group.sides, start=1):
                side.tell(p.Disconnect(_shard(peer, rank).agent))

    def read(self, peer: PeerInfo, pieces: Sequence[Piece], deadline_s: float) -> ShardedTransfer:
        """See ``Transport.read``. Of a follower that hangs, nothing is heard by the deadline: whoever waits must keep
        the time as well (``transfer.reader``); the follower is given up soon after."""
        own = self._own.read(_shard(peer, 0), pieces, deadline_s)
        others = [
            side.read(p.Read(0, _shard(peer, rank), tuple(pieces), deadline_s))
            for rank, side in enumerate(self._group.sides, start=1)
        ]
        return ShardedTransfer([own, *others])

    def checksum(self, offset: int, nbytes: int) -> bytes:
        """See ``Transport.checksum``: of all shards, in order of ranks."""
        asked = [side.ask(p.Digest(0, offset, nbytes)) for side in self._group.sides]
        return b"".join([self._own.checksum(offset, nbytes), *_collect(asked, "compute a checksum")])

    def attend(self, seconds: float) -> None:
        """See ``Transport.attend``."""
        self._own.attend(seconds)
        for side in self._group.sides:
            side.tell(p.Attend(seconds))

    def close(self) -> None:
        """See ``Transport.close``. The followers close theirs when the group ends, which must be after this."""
        self._own.close()


def _shard(peer: PeerInfo, rank: int) -> PeerInfo:
    """What one rank reads from: its like, or the only one there is."""
    if rank and peer.shards:
        return peer.shards[rank - 1]
    return msgspec.structs.replace(peer, shards=()) if peer.shards else peer


def _collect(asked: Sequence[Future[bytes]], what: str) -> list[bytes]:
    """All answers, or the first error."""
    _, late = wait(asked, ANSWER_S)
    if late:
        raise TransferFailed(f"a shard did not {what} within {ANSWER_S:.0f} s")
    return [future.result() for future in asked]
