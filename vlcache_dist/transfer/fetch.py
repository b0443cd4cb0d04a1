"""The reader's side: lease an object at its holder, READ it into the own arena, and admit it only if all held.

::

    Hello (once per peer) ─> Acquire ─> begin ─> READ ─> Release: still valid? ─> checksum ─> commit
                                           │       └ timeout: quarantine the destination until nothing can write it
                                           └ no room: StoreFull

Where somebody waits to compute on what arrives, ``begin`` comes before ``Acquire``: the pass is laid out while the
holder is asked.

Bytes are admitted only if the transfer is done, in time, the lease lived to the end with the same generation, and the
checksum (where one is wanted) matches. Anything else raises a CacheError, and the request recomputes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from vlcache_dist import wire
from vlcache_dist.errors import (
    ChecksumMismatch,
    LayoutMismatch,
    LeaseLost,
    ObjectGone,
    ProtocolError,
    StoreFull,
    TransferFailed,
    TransferTimeout,
    VLCacheError,
)
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.transfer.base import PeerInfo, Piece, Transport
from vlcache_dist.transfer.link import PROBE_SIZES, Link, group_edges, landing_times, link_floor
from vlcache_dist.transfer.reader import ExtentReader
from vlcache_dist.types import ContentKey, ObjectKind, Variant, WorkerId

log = logging.getLogger(__name__)

DEFAULT_GROUP_BYTES = 16 << 20  #: from a peer that was not probed
PROBES = 3  #: READs per size, when peers meet
LEASE_SHARE = 0.9  #: of a lease's time, counted from when it was asked for, in which a READ must end


CallPeer = Callable[..., Awaitable[wire.Message]]  #: (address, message, *, timeout_s): ``RpcClient.call`` in production
OnExtent = Callable[[Extent], None]  #: where the object will be
OnGroup = Callable[[Extent, int, int], None]  #: (extent, layer_start, layer_stop): those layers have arrived


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """``transfer_s``, the reader's own deadline, must be shorter than ``lease_s``. ``control_s``: one small call.
    ``verify_across_hosts``: checksum what comes from another host; ``verify_on_host``: and from this one.
    ``group_bytes``: the least that a group of layers is worth reading by itself; None: what the link's curve says.
    A group that takes longer than ``group_slack`` times what the curve says, and ``group_grace_s`` besides, ends the
    fetch: computing the image is better than waiting.
    ``floor``: bytes/s below which a pair counts as slow; None: what ``link_floor`` says. ``refuse_slow``: objects are
    not fetched over such a pair at all. (Handoffs are: a request that was prefilled has nowhere else to go.)"""

    lease_s: float = 10.0
    transfer_s: float = 5.0
    control_s: float = 2.0
    verify_across_hosts: bool = True
    verify_on_host: bool = False
    group_bytes: int | None = None
    group_slack: float = 8.0
    group_grace_s: float = 0.5
    floor: float | None = None
    refuse_slow: bool = False

    def __post_init__(self) -> None:
        if self.transfer_s >= self.lease_s:
            raise ValueError(f"a READ of up to {self.transfer_s} s outlasts a lease of {self.lease_s} s")
        if self.group_bytes is not None and self.group_bytes < 1:
            raise ValueError(f"groups of {self.group_bytes} bytes")


@dataclass(slots=True)
class _Flight:
    """A fetch that several callers wait for. The object it brings stays pinned until the last has left."""

    task: asyncio.Task[Extent] | None = None
    waiting: int = 0
    extent: Extent | None = None
    groups: list[tuple[Extent, int, int]] = field(default_factory=list)  # that have landed
    listeners: list[tuple[OnGroup, OnExtent | None]] = field(default_factory=list)

    def begun(self, extent: Extent) -> None:
        self.extent = extent
        for _, on_extent in self.listeners:
            if on_extent is not None:
                on_extent(extent)

    def landed(self, extent: Extent, start: int, stop: int) -> None:
        self.groups.append((extent, start, stop))
        for on_group, _ in self.listeners:
            on_group(extent, start, stop)

    def listen(self, on_group: OnGroup, on_extent: OnExtent | None) -> None:
        """Hear of what has happened and of what is to come."""
        if self.extent is not None and on_extent is not None:
            on_extent(self.extent)
        for group in self.groups:
            on_group(*group)
        self.listeners.append((on_group, on_extent))


class Fetcher:
    """One event loop's. Simultaneous fetches of the same object share one transfer."""

    def __init__(
        self,
        store: ObjectStore,
        layout: KVLayout,
        transport: Transport,
        call: CallPeer,
        limits: FetchLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._layout = layout
        self._transport = transport
        self._call = call
        self._limits = limits
        self._clock = clock
        self._reader = ExtentReader(store, transport, clock)
        self._peers: dict[WorkerId, PeerInfo] = {}
        self._links: dict[WorkerId, Link] = {}
        self._probing = asyncio.Lock()
        self._flights: dict[tuple[ObjectKind, ContentKey, bytes, bool], _Flight] = {}
        self.bytes_read = 0
        self.reads = 0
        self.failures: dict[str, int] = {}

    async def fetch(
        self,
        holder: wire.Holder,
        kind: ObjectKind,
        key: ContentKey,
        elements: int,
        *,
        prefix: int | None = None,
        exact_variant: bool = False,
        meta: Any = None,
        on_group: OnGroup | None = None,
        on_extent: OnExtent | None = None,
    ) -> Extent:
        """The holder's object in the own store, committed and pinned once for the caller.

        ``elements``: its whole size. ``prefix``: only so many leading elements, in a staging extent (committed,
        pinned). ``exact_variant``: no other variant will do.

        ``on_group``: called on the way, group by group in order of layers, so that computing on the first ones can
        start; what has no layers is one group. What it is told is *not admitted yet*: results count only if this call
        returns, and if it raises, the extent is no longer the caller's. A caller that joins another's fetch hears of
        the same groups; of all layers at once, and at the end, if the other did not ask for groups. ``on_extent``, only
        with ``on_group``: called before the holder is asked, so that what is to be computed can be prepared; the holder
        must then have the variant that ``holder`` names.

        Raises CacheError, WorkerLost, DeadlineExceeded or ProtocolError.
        """
        if prefix is not None and prefix < elements:
            watch = None
            if on_group is not None:
                watch = _Flight()
                watch.listen(on_group, on_extent)
            return await self._counted(self._fetch(holder, kind, key, elements, prefix, exact_variant, meta, watch))
        name = (kind, key, holder.variant, exact_variant)
        flight = self._flights.get(name)
        if flight is None:
            flight = self._flights[name] = _Flight()
            landed = None if on_group is None else flight
            flight.task = asyncio.create_task(
                self._counted(self._fetch(holder, kind, key, elements, None, exact_variant, meta, landed))
            )
            flight.task.add_done_callback(_retrieve)
        if on_group is not None:
            flight.listen(on_group, on_extent)
        flight.waiting += 1
        assert flight.task is not None
        try:
            extent = await asyncio.shield(flight.task)
            self._store.pin(extent)
        finally:
            flight.waiting -= 1
            if (flight.task.done() or not flight.waiting) and self._flights.get(name) is flight:
                del self._flights[name]
            if not flight.waiting:
                self._end(flight)
            if on_group is not None:
                flight.listeners.remove((on_group, on_extent))
        if on_group is not None and not flight.groups:
            on_group(extent, 0, self._layout.num_layers)
        return extent

    async def fetch_staging(self, worker_id: WorkerId, address: str, lease: wire.Lease) -> Extent:
        """Read a staging extent that its holder leased for this worker, into one of the own store that is still
        FILLING: the caller's to abort once it is unpacked. The lease stays the holder's to end. Raises as ``fetch``."""
        return await self._counted(self._fetch_staging(worker_id, address, lease))

    async def introduce(self, worker_id: WorkerId, address: str, sizes: Sequence[int] = PROBE_SIZES) -> Link:
        """Shake hands with a peer and read so many bytes of its arena, whatever they hold, so that the first real READ
        finds the way made. Returns the fastest of ``PROBES`` equal READs per size. Sizes for which there is no free
        room here (nothing is evicted for a probe), or that the peer's arena does not have, are left out. One peer is
        measured at a time: peers that shared the way, or the room for READs, would measure each other. Raises as
        ``fetch``; StoreFull if there is no room at all."""
        peer = await self._connect(worker_id, address)
        async with self._probing:
            points = await self._probe(peer, sizes)
        ours = self._transport.info
        floor = self._limits.floor
        if floor is None:
            floor = link_floor(ours.device, peer.device, same_host=ours.host == peer.host)
        link = self._links[worker_id] = Link(tuple(points), floor)
        return link

    async def _probe(self, peer: PeerInfo, sizes: Sequence[int]) -> list[tuple[int, float]]:
        itemsize = self._layout.itemsize
        points: list[tuple[int, float]] = []
        room = min(peer.nbytes // itemsize, self._store.stats().largest_free, self._store.max_quarantine // 2)
        fitting = [size for size in sizes if size // itemsize <= room]
        for nbytes in fitting or [max(room, 1) * itemsize]:
            times = []
            for _ in range(PROBES):
                try:
                    extent = self._store.stage(nbytes // itemsize, self._clock(), transfer=True)
                except StoreFull:  # requests fetch meanwhile
                    if points:
                        return points
                    raise
                started = self._clock()
                await self._read(peer, extent, 0, started + self._limits.transfer_s)
                times.append(max(self._clock() - started, 1e-9))
                self._store.abort(extent)
            points.append((nbytes, min(times)))
        return points

    def refuses(self, worker_id: WorkerId) -> bool:
        """True if objects are not read from that peer: its link is below the floor, and that is not put up with."""
        link = self._links.get(worker_id)
        return self._limits.refuse_slow and link is not None and link.slow

    def layer_groups(self, worker_id: WorkerId, elements: int) -> tuple[int, ...]:
        """Edges of the groups of layers in which ``fetch`` with ``on_group`` reads a KV object from that worker."""
        link = self._links.get(worker_id)
        group_bytes = self._limits.group_bytes
        if group_bytes is None:
            group_bytes = DEFAULT_GROUP_BYTES if link is None else link.group_bytes
        return group_edges(self._layout.num_layers, elements * self._layout.itemsize, group_bytes)

    def forget_peer(self, worker_id: WorkerId) -> None:
        """A worker is gone: the next fetch from that id shakes hands anew."""
        self._links.pop(worker_id, None)
        peer = self._peers.pop(worker_id, None)
        if peer is not None:
            self._transport.disconnect(peer.agent)

    async def close(self) -> None:
        """End what is under way; callers that still wait see CancelledError."""
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reader.close()

    # -- one object ---------------------------------------------------------------------------------------------

    async def _fetch(
        self,
        holder: wire.Holder,
        kind: ObjectKind,
        key: ContentKey,
        elements: int,
        prefix: int | None,
        exact_variant: bool,
        meta: Any,
        flight: _Flight | None,
    ) -> Extent:
        peer = await self._connect(holder.worker_id, holder.address)
        if self.refuses(holder.worker_id):
            raise TransferFailed(f"{holder.worker_id} is refused: the link to it is below its floor")
        itemsize = self._layout.itemsize
        verify = self._must_verify(peer)

        def begin(variant: Variant) -> Extent:
            if prefix is not None:
                return self._store.stage(prefix, self._clock(), transfer=True)
            return self._store.begin(kind, key, variant, elements, self._clock(), transfer=True, meta=meta)

        only = holder.variant if exact_variant or (flight is not None and prefix is None) else None
        asked_at = self._clock()
        acquire = wire.Acquire(
            reader=self._transport.info.worker_id,
            key=key,
            kind=kind,
            layout=self._layout,
            variant=only,
            ttl_s=self._limits.lease_s,
            checksum=verify,
            prefix=0 if prefix is None else prefix * itemsize,
        )
        extent: Extent | None = None
        lease: wire.Lease | None = None
        reading = False
        try:
            if flight is not None:
                extent = begin(holder.variant)
                flight.begun(extent)
            lease = await self._acquire(holder.address, acquire)
            if lease.nbytes != elements * itemsize:
                raise LayoutMismatch(
                    f"{key.hex()[:16]} has {lease.nbytes} bytes at {holder.worker_id}, {elements * itemsize} here"
                )
            if only is not None and lease.variant != only:
                raise ObjectGone(f"{holder.worker_id} has another variant of {key.hex()[:16]}")
            if extent is None:
                extent = begin(lease.variant)
            deadline = min(self._clock() + self._limits.transfer_s, asked_at + lease.ttl_s * LEASE_SHARE)
            reading = True  # from here on the reader gives the extent back if it fails
            await self._read(peer, extent, lease.offset, deadline, None if flight is None else flight.landed)
        except BaseException:
            if extent is not None and not reading:
                self._store.abort(extent)
            if lease is not None:
                self._reader.spawn(self._let_go(holder.address, lease))
            raise
        released: wire.Released | None = None
        try:
            released = await self._ask(holder.address, wire.Release(lease.lease_id, lease.generation), wire.Released)
            if not released.valid:
                raise LeaseLost(f"the lease on {key.hex()[:16]} at {holder.worker_id} ended while it was read")
            if verify:
                await self._verify(extent, lease.checksum, holder.worker_id)
        except BaseException:
            self._store.abort(extent)
            if released is None:  # a caller that leaves now may have taken the word back before the holder heard it
                self._reader.spawn(self._let_go(holder.address, lease))
            raise
        whole = verify and prefix is None
        return self._store.commit(extent, pin=True, checksum=lease.checksum if whole else None)

    async def _fetch_staging(self, worker_id: WorkerId, address: str, lease: wire.Lease) -> Extent:
        peer = await self._connect(worker_id, address)
        extent = self._store.stage(lease.nbytes // self._layout.itemsize, self._clock(), transfer=True)
        await self._read(peer, extent, lease.offset, self._clock() + self._limits.transfer_s)
        try:
            # How much of the lease's time was gone when it came here is not known: its holder must say that it held.
            verify = self._must_verify(peer)
            patience_s = self._limits.transfer_s if verify else self._limits.control_s  # it may read all that it sent
            renew = wire.Renew(lease.lease_id, lease.generation, patience_s, verify)
            held = await self._ask(address, renew, wire.Lease, patience_s)
            if verify:
                await self._verify(extent, held.checksum, worker_id)
        except BaseException:
            self._store.abort(extent)
            raise
        return extent

    async def _read(
        self, peer: PeerInfo, extent: Extent, offset: int, deadline: float, on_group: OnGroup | None = None
    ) -> None:
        """READ all of ``extent`` from byte ``offset`` of the peer's arena; if it fails, the extent is gone."""
        itemsize = self._layout.itemsize
        groups: list[tuple[int, int]] = []
        ranges, deadlines = [(0, extent.elements)], [deadline]
        if on_group is not None and extent.kind is not ObjectKind.KV:
            groups = [(0, self._layout.num_layers)]
        elif on_group is not None:
            edges = self.layer_groups(peer.worker_id, extent.elements)
            groups = list(pairwise(edges))
            num_tokens = extent.elements // self._layout.kv_token
            ranges = [self._layout.layer_range(num_tokens, start, stop) for start, stop in groups]
            deadlines = self._group_deadlines(peer, edges, extent.elements * itemsize, deadline)
        pieces = [
            Piece(offset + start * itemsize, (extent.offset + start) * itemsize, length * itemsize)
            for start, length in ranges
        ]

        def landed(index: int) -> None:
            if on_group is not None:
                on_group(extent, *groups[index])

        try:
            await self._reader.read(peer, extent, pieces, deadlines, landed)
        except (TransferFailed, TransferTimeout):
            self._peers.pop(peer.worker_id, None)
            raise
        self.bytes_read += extent.elements * itemsize
        self.reads += 1

    def _group_deadlines(self, peer: PeerInfo, edges: Sequence[int], nbytes: int, deadline: float) -> list[float]:
        link = self._links.get(peer.worker_id)
        if link is None:
            return [deadline] * (len(edges) - 1)
        now, limits = self._clock(), self._limits
        return [
            min(deadline, now + limits.group_grace_s + limits.group_slack * seconds)
            for seconds in landing_times(edges, nbytes, link)
        ]

    def _must_verify(self, peer: PeerInfo) -> bool:
        same_host = peer.host == self._transport.info.host
        return self._limits.verify_on_host if same_host else self._limits.verify_across_hosts

    async def _verify(self, extent: Extent, expected: bytes | None, worker_id: WorkerId) -> None:
        offset, nbytes = extent.offset * self._layout.itemsize, extent.elements * self._layout.itemsize
        if not checksums_agree(await asyncio.to_thread(self._transport.checksum, offset, nbytes), expected):
            raise ChecksumMismatch(f"{nbytes} bytes of {extent.key.hex()[:16]} from {worker_id} arrived damaged")

    # -- peers --------------------------------------------------------------------------------------------------

    async def _connect(self, worker_id: WorkerId, address: str) -> PeerInfo:
        known = self._peers.get(worker_id)
        if known is not None:
            return known
        reply = await self._ask(address, wire.Hello(self._transport.info), wire.HelloReply)
        if reply.peer.worker_id != worker_id:
            raise ObjectGone(f"{reply.peer.worker_id} answers at {address}, where {worker_id} was")
        await asyncio.to_thread(self._transport.connect, reply.peer)
        self._peers[worker_id] = reply.peer
        return reply.peer

    async def _ask(self, address: str, message: wire.Message, kind: type[Any], timeout_s: float | None = None) -> Any:
        reply = await self._call(address, message, timeout_s=timeout_s or self._limits.control_s)
        if not isinstance(reply, kind):
            raise ProtocolError(f"{type(message).__name__} was answered with {type(reply).__name__}")
        return reply

    async def _acquire(self, address: str, acquire: wire.Acquire) -> wire.Lease:
        """A caller that is cancelled while the holder grants the lease must not leave it there."""
        asking: asyncio.Task[wire.Lease] = asyncio.create_task(self._ask(address, acquire, wire.Lease))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._reader.spawn(self._let_go_of(address, asking))
            raise

    async def _let_go_of(self, address: str, asking: asyncio.Task[wire.Lease]) -> None:
        try:
            lease = await asking
        except VLCacheError:
            return  # nothing was granted
        await self._let_go(address, lease)

    async def _let_go(self, address: str, lease: wire.Lease) -> None:
        try:
            await self._ask(address, wire.Release(lease.lease_id, lease.generation), wire.Released)
        except VLCacheError as error:
            log.info("a lease at %s is left to expire: %s", address, error)

    async def _counted(self, work: Awaitable[Extent]) -> Extent:
        try:
            return await work
        except VLCacheError as error:
            self.failures[error.code] = self.failures.get(error.code, 0) + 1
            raise

    def _end(self, flight: _Flight) -> None:
        """Nobody waits any more: drop the flight's own pin, or the fetch."""
        assert flight.task is not None
        if not flight.task.done():
            flight.task.cancel()
        elif not flight.task.cancelled() and flight.task.exception() is None:
            self._store.unpin(flight.task.result())


def _retrieve(task: asyncio.Task[Extent]) -> None:
    """A fetch that failed after its callers were gone has nobody else to hear of it."""
    if not task.cancelled():
        task.exception()


def checksums_agree(found: bytes, announced: bytes | None) -> bool:
    """Whether a reader's checksums, one per shard, are the announced ones. What a holder keeps in one piece, encoder
    output, is the same in every shard: then each must be the one that was announced."""
    return announced is not None and found == announced * (len(found) // max(1, len(announced)))
