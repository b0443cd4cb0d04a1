"""The holder's side of a READ: lease an object, keep it where it is while somebody reads, say whether the lease held.

The directory's word is a hint; this is the authority.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import torch

from vlcache_dist import wire
from vlcache_dist.errors import LayoutMismatch, ObjectGone
from vlcache_dist.kv.object_store import Extent, LeaseGrant, ObjectStore
from vlcache_dist.transfer.base import Transport
from vlcache_dist.types import WorkerId

ATTEND_S = 0.1  #: how long the transport expects a READ from another host after a lease was granted
MAX_READERS = 1024  #: whose host is remembered


class HolderService:
    """Answers readers out of one store and its arena."""

    def __init__(
        self,
        store: ObjectStore,
        arena: torch.Tensor,
        transport: Transport,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._transport = transport
        self._clock = clock
        self._itemsize = arena.element_size()
        self._hosts: dict[WorkerId, str] = {}  # of readers
        # By extent id and length: extents never change once committed.
        self._checksums: dict[tuple[int, int], bytes] = {}

    async def hello(self, message: wire.Hello) -> wire.HelloReply:
        """Handshake. Raises LayoutMismatch, which says what differs."""
        ours = self._transport.info
        if difference := ours.layout.difference(message.peer.layout):
            raise LayoutMismatch(f"{ours.worker_id} and {message.peer.worker_id} keep different KV: {difference}")
        if len(self._hosts) >= MAX_READERS:
            self._hosts.pop(next(iter(self._hosts)))
        self._hosts[message.peer.worker_id] = message.peer.host
        return wire.HelloReply(ours)

    async def acquire(self, message: wire.Acquire) -> wire.Lease:
        """Raises ObjectGone or LayoutMismatch."""
        ours = self._transport.info
        if difference := ours.layout.difference(message.layout):
            raise LayoutMismatch(f"{ours.worker_id} and {message.reader} keep different KV: {difference}")
        extent = self._store.lookup(message.kind, message.key, message.variant)
        if extent is None:
            raise ObjectGone(f"{ours.worker_id} has no {message.kind} of {message.key.hex()[:16]}")
        grant = self._store.lease(extent, message.ttl_s, self._clock())
        try:
            digest = await self._checksum(grant, message.prefix) if message.checksum else None
        except BaseException:
            self._store.release(grant.lease_id, grant.generation, self._clock())
            raise
        if self._hosts.get(message.reader, ours.host) != ours.host:
            self._transport.attend(ATTEND_S)
        return self._lease(grant, digest)

    def lease(self, extent: Extent, ttl_s: float) -> wire.Lease:
        """Lease a committed extent of any kind on a reader's behalf (a handoff's staging extent)."""
        return self._lease(self._store.lease(extent, ttl_s, self._clock()), None)

    async def renew(self, message: wire.Renew) -> wire.Lease:
        """Raises LeaseLost."""
        grant = self._store.renew(message.lease_id, message.generation, message.ttl_s, self._clock())
        return self._lease(grant, await self._checksum(grant, 0) if message.checksum else None)

    async def release(self, message: wire.Release) -> wire.Released:
        return wire.Released(self._store.release(message.lease_id, message.generation, self._clock()))

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

    async def _checksum(self, grant: LeaseGrant, prefix: int) -> bytes:
        """Of the object's first ``prefix`` bytes (0: all). Computed once, under the lease that keeps them in place."""
        extent = grant.extent
        whole = extent.elements * self._itemsize
        nbytes = whole if prefix == 0 else min(prefix, whole)
        if nbytes == whole and grant.checksum is not None:
            return grant.checksum
        name = (extent.id, nbytes)
        if name not in self._checksums:
            digest = await asyncio.to_thread(self._transport.checksum, extent.offset * self._itemsize, nbytes)
            if len(self._checksums) > 4 * max(1, self._store.stats().num_objects):
                self._checksums.clear()
            self._checksums[name] = digest
        return self._checksums[name]
