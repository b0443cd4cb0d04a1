"""The reader's side: lease an object at its holder, READ it into the own arena, and admit it only if all held.

::

    Hello (once per peer) ─> Acquire ─> begin ─> READ ─> Release: still valid? ─> checksum ─> commit
                                           │       └ timeout: quarantine the destination until nothing can write it
                                           └ no room: StoreFull

Bytes are admitted only if the transfer is done, in time, the lease lived to the end with the same generation, and the
checksum (where one is wanted) matches. Anything else raises a CacheError, and the request recomputes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlcache_dist import wire
from vlcache_dist.errors import (
    ChecksumMismatch,
    LeaseLost,
    ObjectGone,
    ProtocolError,
    TransferFailed,
    TransferTimeout,
    VLCacheError,
)
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.transfer.base import PeerInfo, Piece, Transfer, Transport
from vlcache_dist.transfer.checksum import checksum
from vlcache_dist.types import ContentKey, ObjectKind, WorkerId

log = logging.getLogger(__name__)

QUARANTINE_POLL_S = 0.05


CallPeer = Callable[..., Awaitable[wire.Message]]  #: (address, message, *, timeout_s): ``RpcClient.call`` in production


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """``transfer_s``, the reader's own deadline, must be shorter than ``lease_s``. ``control_s``: one small call.
    ``verify_across_hosts``: checksum what comes from another host."""

    lease_s: float = 10.0
    transfer_s: float = 5.0
    control_s: float = 2.0
    verify_across_hosts: bool = True

    def __post_init__(self) -> None:
        if self.transfer_s >= self.lease_s:
            raise ValueError(f"a READ of up to {self.transfer_s} s outlasts a lease of {self.lease_s} s")


class Fetcher:
    """One event loop's. Simultaneous fetches of the same object share one transfer."""

    def __init__(
        self,
        store: ObjectStore,
        arena: torch.Tensor,
        layout: KVLayout,
        transport: Transport,
        call: CallPeer,
        limits: FetchLimits,
    ) -> None:
        self._store = store
        self._arena = arena
        self._layout = layout
        self._transport = transport
        self._call = call
        self._limits = limits
        self._peers: dict[WorkerId, PeerInfo] = {}
        self._under_way: dict[tuple[ObjectKind, ContentKey, bytes], asyncio.Future[None]] = {}
        self._watching: set[asyncio.Task[None]] = set()
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
    ) -> Extent:
        """The holder's object in the own store, committed and pinned once for the caller.

        ``elements``: its whole size. ``prefix``: only so many leading elements, in a staging extent (committed, pinned).
        ``exact_variant``: no other variant will do. Raises CacheError, WorkerLost or DeadlineExceeded.
        """
        if prefix is not None and prefix < elements:
            return await self._counted(self._read(holder, kind, key, elements, prefix, exact_variant, meta))
        name = (kind, key, holder.variant)
        while (ahead := self._under_way.get(name)) is not None:
            await asyncio.shield(ahead)
            if (found := self._store.lookup(kind, key, holder.variant, pin=True)) is not None:
                return found
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way[name] = done
        try:
            return await self._counted(self._read(holder, kind, key, elements, None, exact_variant, meta))
        finally:
            del self._under_way[name]
            done.set_result(None)

    async def fetch_staging(self, worker_id: WorkerId, address: str, lease: wire.Lease) -> Extent:
        """Read a staging extent that its holder leased for this worker, into one of the own store that is still
        FILLING: the caller's to abort once it is unpacked. The lease stays the holder's to end. Raises as ``fetch``."""
        peer = await self._connect(worker_id, address)
        elements = lease.nbytes // self._layout.itemsize
        extent = self._store.stage(elements, time.monotonic(), transfer=True)
        await self._counted(self._transfer(peer, extent, lease.offset, lease.nbytes, lease.ttl_s))
        return extent

    async def introduce(self, worker_id: WorkerId, address: str, nbytes: int) -> float:
        """Shake hands with a peer and read ``nbytes`` of its arena, whatever they hold, so that the first real READ finds
        the way made. Returns bytes/s of a second, equal READ. Raises as ``fetch``."""
        peer = await self._connect(worker_id, address)
        nbytes = min(nbytes, peer.nbytes) // self._layout.itemsize * self._layout.itemsize
        seconds = 0.0
        for _ in range(2):
            extent = self._store.stage(nbytes // self._layout.itemsize, time.monotonic(), transfer=True)
            started = time.monotonic()
            await self._transfer(peer, extent, 0, nbytes, self._limits.lease_s)
            seconds = time.monotonic() - started
            self._store.abort(extent)
        return nbytes / max(seconds, 1e-9)

    def forget_peer(self, worker_id: WorkerId) -> None:
        """A worker is gone: the next fetch from that id shakes hands anew."""
        peer = self._peers.pop(worker_id, None)
        if peer is not None:
            self._transport.disconnect(peer.agent)

    async def close(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)

    # -- one object ---------------------------------------------------------------------------------------------

    async def _read(
        self,
        holder: wire.Holder,
        kind: ObjectKind,
        key: ContentKey,
        elements: int,
        prefix: int | None,
        exact_variant: bool,
        meta: Any,
    ) -> Extent:
        peer = await self._connect(holder.worker_id, holder.address)
        verify = self._limits.verify_across_hosts and peer.host != self._transport.info.host and prefix is None
        acquire = wire.Acquire(
            reader=self._transport.info.worker_id,
            key=key,
            kind=kind,
            layout=self._layout,
            variant=holder.variant if exact_variant else None,
            ttl_s=self._limits.lease_s,
            checksum=verify,
        )
        lease = await self._ask(holder.address, acquire, wire.Lease)
        valid = False
        try:
            expected = elements * self._layout.itemsize
            if lease.nbytes != expected:
                raise ProtocolError(f"{holder.worker_id} has {lease.nbytes} bytes of {key.hex()[:16]}, not {expected}")
            if prefix is None:
                extent = self._store.begin(
                    kind, key, lease.variant, elements, time.monotonic(), transfer=True, meta=meta
                )
                nbytes = expected
            else:
                extent = self._store.stage(prefix, time.monotonic(), transfer=True)
                nbytes = prefix * self._layout.itemsize
            await self._transfer(peer, extent, lease.offset, nbytes, lease.ttl_s)
        except BaseException:
            self._spawn(self._let_go(holder.address, lease))
            raise
        try:
            valid = (await self._ask(holder.address, wire.Release(lease.lease_id, lease.generation), wire.Released)).valid
            if not valid:
                raise LeaseLost(f"the lease on {key.hex()[:16]} at {holder.worker_id} ended while it was read")
            if verify:
                await self._verify(extent, lease, holder)
        except BaseException:
            self._store.abort(extent)
            raise
        return self._store.commit(extent, pin=True)

    async def _transfer(self, peer: PeerInfo, extent: Extent, offset: int, nbytes: int, ttl_s: float) -> None:
        """READ into ``extent``; if it fails, the extent is aborted or quarantined before this raises."""
        deadline = min(self._limits.transfer_s, ttl_s * 0.5)
        piece = Piece(offset, extent.offset * self._layout.itemsize, nbytes)
        try:
            transfer = self._transport.read(peer, [piece], deadline)
        except BaseException:
            self._store.abort(extent)
            raise
        try:
            await asyncio.wrap_future(transfer.future)
        except BaseException as error:
            if transfer.terminal:
                self._store.abort(extent)
            else:
                self._quarantine(extent, transfer)
            if isinstance(error, TransferFailed | TransferTimeout):
                self._peers.pop(peer.worker_id, None)
            raise
        self.bytes_read += nbytes
        self.reads += 1

    async def _verify(self, extent: Extent, lease: wire.Lease, holder: wire.Holder) -> None:
        offset, nbytes = extent.offset * self._layout.itemsize, extent.elements * self._layout.itemsize
        if lease.checksum != await asyncio.to_thread(checksum, self._arena, offset, nbytes):
            raise ChecksumMismatch(f"{nbytes} bytes of {extent.key.hex()[:16]} from {holder.worker_id} arrived damaged")

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

    async def _ask(self, address: str, message: wire.Message, kind: type[Any]) -> Any:
        reply = await self._call(address, message, timeout_s=self._limits.control_s)
        if not isinstance(reply, kind):
            raise ProtocolError(f"{type(message).__name__} was answered with {type(reply).__name__}")
        return reply

    async def _let_go(self, address: str, lease: wire.Lease) -> None:
        try:
            await self._ask(address, wire.Release(lease.lease_id, lease.generation), wire.Released)
        except VLCacheError as error:
            log.info("a lease at %s is left to expire: %s", address, error)

    async def _counted(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except VLCacheError as error:
            self.failures[error.code] = self.failures.get(error.code, 0) + 1
            raise

    # -- destinations that may still be written -----------------------------------------------------------------

    def _quarantine(self, extent: Extent, transfer: Transfer) -> None:
        self._store.quarantine(extent)
        self._spawn(self._watch(extent, transfer))

    async def _watch(self, extent: Extent, transfer: Transfer) -> None:
        while not transfer.terminal:
            await asyncio.sleep(QUARANTINE_POLL_S)
        self._store.release_quarantine(extent)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)
