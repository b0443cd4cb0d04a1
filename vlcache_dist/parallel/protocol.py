"""What a leader tells its followers, and what they say to it, over two links per follower.

The *steps* link carries what the leader's ``Runner`` is told, in that order; the follower does the same on its shard.
The *side* link carries what must not wait for a forward pass: READs, checksums, signs of life.

Offsets are elements (steps) or bytes (READs) from the start of the arena: the leader's books hold for every rank, since
all arenas are laid out alike.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import msgspec
import numpy as np

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.lazy import Traffic
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.base import PeerInfo, Piece


def _any_of(base: type) -> Any:
    return functools.reduce(operator.or_, base.__subclasses__())


class Command(msgspec.Struct, frozen=True, tag=True):
    """Leader to follower, steps link."""


class Open(Command, frozen=True):
    """Make the arena and, unless ``worker_id`` is empty, a transport over it. ``layout`` is the leader's; the
    follower's differs in its rank. ``devices``: of rank 1 and on. Answered with ``Opened``."""

    layout: KVLayout
    arena_elements: int
    devices: tuple[str, ...]
    worker_id: str


class Load(Command, frozen=True):
    """Meet the other ranks at the leader's store and load the shard's weights from the checkpoint in ``folder``, whose
    fingerprint must be ``layout.model``. Answered with ``Loaded``."""

    store_port: int
    folder: str


class Allocate(Command, frozen=True):
    """Make the pages and the runner over them, with or without CUDA graphs. Answered with ``Ok``."""

    num_blocks: int
    block_size: int
    graphs: bool


class Launch(Command, frozen=True):
    """A forward pass."""

    step: StepBatch


class Expect(Command, frozen=True):
    """``Runner.expect``."""

    traffic: Traffic


class Prepare(Command, frozen=True):
    """``Runner.prepare``: the ranks have seen the same shapes, and capture the same one."""


class BeginLayers(Command, frozen=True):
    """A forward pass that ``RunLayers`` takes up the layers; the one before it is over."""

    step: StepBatch
    edges: tuple[int, ...]


class PrepareLayers(Command, frozen=True):
    """``Streamer.prepare``."""


class RunLayers(Command, frozen=True):
    """Layers [start, stop) of the pass that was begun last."""

    start: int
    stop: int


class Erase(Command, frozen=True):
    """``Streamer.erase``."""

    slots: np.ndarray


class Scatter(Command, frozen=True):
    """``Runner.scatter``."""

    src: np.ndarray
    span_tokens: np.ndarray
    slots: np.ndarray
    positions: np.ndarray


class Pack(Command, frozen=True):
    """``Runner.pack`` into the staging extent at ``offset``."""

    slots: np.ndarray
    offset: int
    elements: int


class Unpack(Command, frozen=True):
    """``Runner.unpack`` from the staging extent at ``offset``."""

    slots: np.ndarray
    offset: int
    elements: int


class StoreEmbeddings(Command, frozen=True):
    """Receive encoder output [rows, hidden] from rank 0 into the extent at ``offset``."""

    offset: int
    rows: int


class Reread(Command, frozen=True):
    """Take part in ``Runner.reread``."""

    step: StepBatch
    layer: int
    slots: np.ndarray


class Lend(Command, frozen=True):
    """``Runner.lend`` into the staging extent at ``offset``."""

    extent: tuple[int, int]
    probes: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    offset: int
    elements: int


class Compare(Command, frozen=True):
    """Take part in ``engine.watch``'s comparison: per span the offset of its extent, its length and its probes
    [p]; ``slots`` of all probes."""

    extents: tuple[tuple[int, int], ...]
    probes: tuple[np.ndarray, ...]
    slots: np.ndarray


class Synchronize(Command, frozen=True):
    """Answered with ``Ok`` when the follower's device has done everything before this."""


COMMANDS: Any = _any_of(Command)


class Reply(msgspec.Struct, frozen=True, tag=True):
    """Follower to leader, steps link."""


class Opened(Reply, frozen=True):
    peer: PeerInfo | None


class Loaded(Reply, frozen=True):
    """``free_bytes``: device memory that is left for pages."""

    free_bytes: int


class Ok(Reply, frozen=True):
    pass


class Failed(Reply, frozen=True):
    """The follower's last word; it ends. ``code``: the error's class (``errors``)."""

    code: str
    message: str


REPLIES: Any = _any_of(Reply)


class SideCommand(msgspec.Struct, frozen=True, tag=True):
    """Leader to follower, side link. ``id``, where there is one, comes back in an ``Answer``."""


class Connect(SideCommand, frozen=True):
    id: int
    peer: PeerInfo


class Disconnect(SideCommand, frozen=True):
    agent: str


class Read(SideCommand, frozen=True):
    """READ from a connected peer. An Answer without error also means that it is terminal; after one with an error,
    ``Ended`` says so."""

    id: int
    peer: PeerInfo
    pieces: tuple[Piece, ...]
    deadline_s: float


class Attend(SideCommand, frozen=True):
    seconds: float


class Digest(SideCommand, frozen=True):
    """The checksum of bytes [offset, offset + nbytes) of the arena, as the Answer's data."""

    id: int
    offset: int
    nbytes: int


SIDE_COMMANDS: Any = _any_of(SideCommand)


class SideReply(msgspec.Struct, frozen=True, tag=True):
    """Follower to leader, side link."""


class Beat(SideReply, frozen=True):
    """A sign of life, every ``BEAT_S``."""


class Answer(SideReply, frozen=True):
    """``code`` empty: it went well."""

    id: int
    code: str = ""
    message: str = ""
    data: bytes = b""


class Ended(SideReply, frozen=True):
    """A READ that failed writes no more."""

    id: int


class LastWord(SideReply, frozen=True):
    """The follower has failed, and ends."""

    message: str


SIDE_REPLIES: Any = _any_of(SideReply)

BEAT_S = 0.25
