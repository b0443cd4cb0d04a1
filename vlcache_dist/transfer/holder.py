"""The holder's side of a READ: lease an object, keep it where it is while somebody reads, say whether the lease held.

The directory's word is a hint; this is the authority.
"""

from __future__ import annotations

import asyncio
import time

import torch

from vlcache_dist import wire
from vlcache_dist.errors import LayoutMismatch, ObjectGone
from vlcache_dist.kv.object_store import Extent, LeaseGrant, ObjectStore
from vlcache_dist.transfer.base import Transport
from vlcache_dist.transfer.checksum import checksum


class HolderService:
    """Answers readers out of one store and its arena."""

    def __init__(self, store: ObjectStore, arena: torch.Tensor, transport: Transport) -> None:
        self._store = store
        self._arena = arena
        self._transport = transport
        self._itemsize = arena.element_size()
        self._checksums: dict[int, bytes] = {}  # by extent id; extents never change once committed

    async def hello(self, message: wire.Hello) -> wire.HelloReply:
        """Handshake. Raises LayoutMismatch, which says what differs."""
        ours = self._transport.info
        if difference := ours.layout.difference(message.peer.layout):
            raise LayoutMismatch(f"{ours.worker_id} and {message.peer.worker_id} keep different KV: {difference}")
        return wire.HelloReply(ours)

    async def acquire(self, message: wire.Acquire) -> wire.Lease:
        """Raises ObjectGone or LayoutMismatch."""
        ours = self._transport.info
        if difference := ours.layout.difference(message.layout):
            raise LayoutMismatch(f"{ours.worker_id} and {message.reader} keep different KV: {difference}")
        extent = self._store.lookup(message.kind, message.key, message.variant)
        if extent is None:
            raise ObjectGone(f"{ours.worker_id} has no {message.kind} of {message.key.hex()[:16]}")
        grant = self._store.lease(extent, message.ttl_s, time.monotonic())
        return self._lease(grant, await self._checksum(extent) if message.checksum else None)

    def lease(self, extent: Extent, ttl_s: float) -> wire.Lease:
        """Lease a committed extent of any kind on a reader's behalf (a handoff's staging extent)."""
        return self._lease(self._store.lease(extent, ttl_s, time.monotonic()), None)

    async def renew(self, message: wire.Renew) -> wire.Lease:
        """Raises LeaseLost."""
        return self._lease(
            self._store.renew(message.lease_id, message.generation, message.ttl_s, time.monotonic()), None
        )

    async def release(self, message: wire.Release) -> wire.Released:
        return wire.Released(self._store.release(message.lease_id, message.generation, time.monotonic()))

    async def forget(self, message: wire.Forget) -> wire.Ok:
        extent = self._store.lookup(message.kind, message.key)
        if extent is not None:
            self._store.discard(extent)
        return wire.Ok()

    def _lease(self, grant: LeaseGrant, digest: bytes | None) -> wire.Lease:
        extent = grant.extent
        return wire.Lease(
            lease_id=grant.lease_id,
            generation=grant.generation,
            variant=extent.variant,
            offset=extent.offset * self._itemsize,
            nbytes=extent.elements * self._itemsize,
            ttl_s=grant.ttl_s,
            checksum=digest,
        )

    async def _checksum(self, extent: Extent) -> bytes:
        """Computed once per extent; the lease that the caller holds keeps it in place meanwhile."""
        if extent.id not in self._checksums:
            offset, nbytes = extent.offset * self._itemsize, extent.elements * self._itemsize
            digest = await asyncio.to_thread(checksum, self._arena, offset, nbytes)
            if len(self._checksums) > 4 * max(1, self._store.stats().num_objects):
                self._checksums.clear()
            self._checksums[extent.id] = digest
        return self._checksums[extent.id]
