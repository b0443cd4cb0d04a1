"""The transport seam: one-sided READs between registered arenas, and the rules every transport keeps.

* One arena per worker, registered once, for life. All offsets are bytes from its start.
* ``read`` returns at once; its future ends by the reader's own monotonic deadline, whatever the peer does.
* A transfer that timed out may still write. Its destination must be quarantined until ``terminal`` turns true:
  NIXL has no safe cancel.
* A READ that succeeded is terminal.
* Completion after the deadline is failure, even if the bytes arrived.
* A transport says nothing about validity: leases and generations do (``transfer.holder``).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec

from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.types import WorkerId


class PeerInfo(msgspec.Struct, frozen=True):
    """What a peer must know to read from a worker's arena. ``agent`` contains the incarnation and is never reused.
    ``metadata`` is the transport's own blob (NIXL agent metadata). ``host`` tells whether checksums are due.
    ``shards``: of a tensor-parallel worker, the other ranks' arenas, from rank 1 on; they are laid out alike."""

    worker_id: WorkerId
    agent: str
    metadata: bytes
    base: int
    nbytes: int
    device: str  # "cpu" or "cuda:N" as the owner numbers it
    host: str
    layout: KVLayout
    shards: tuple[PeerInfo, ...] = ()


class Piece(msgspec.Struct, frozen=True):
    """One contiguous range, in bytes from the start of each arena."""

    remote_offset: int
    local_offset: int
    nbytes: int


def check_pieces(pieces: Sequence[Piece], local_nbytes: int, remote_nbytes: int) -> None:
    """Raises ValueError unless there are pieces and each is a range inside both arenas."""
    if not pieces:
        raise ValueError("a READ of nothing")
    for piece in pieces:
        if piece.nbytes < 1 or min(piece.remote_offset, piece.local_offset) < 0:
            raise ValueError(f"{piece} is no range")
        if piece.local_offset + piece.nbytes > local_nbytes or piece.remote_offset + piece.nbytes > remote_nbytes:
            raise ValueError(f"{piece} leaves an arena of {local_nbytes} bytes here, {remote_nbytes} there")


class Transfer(Protocol):
    """A READ under way. ``future`` resolves to None, or raises TransferTimeout / TransferFailed."""

    future: Future[None]

    @property
    def terminal(self) -> bool:
        """True once the destination can no longer be written."""
        ...


class Transport(Protocol):
    """Thread-safe: calls may come from any thread; the implementation has one owner thread of its own."""

    info: PeerInfo

    def connect(self, peer: PeerInfo) -> None:
        """Make ``peer`` readable; idempotent. Raises LayoutMismatch (says what differs) or TransferFailed."""
        ...

    def disconnect(self, agent: str) -> None:
        """Forget a peer, e.g. after its death; unknown names are ignored."""
        ...

    def read(self, peer: PeerInfo, pieces: Sequence[Piece], deadline_s: float) -> Transfer:
        """Start reading. ``deadline_s`` is a duration from now. Raises ValueError for a piece outside an arena."""
        ...

    def checksum(self, offset: int, nbytes: int) -> bytes:
        """What bytes [offset, offset + nbytes) of this arena hold: 16 bytes per shard (``transfer.checksum``). Blocks
        while it is computed. Raises TransferFailed if a shard is lost."""
        ...

    def attend(self, seconds: float) -> None:
        """Peers are about to read from here: for so long, give them more of the CPU than an idle transport does."""
        ...

    def close(self) -> None:
        """Transfers under way fail; afterwards nothing writes into the arena. Idempotent."""
        ...
