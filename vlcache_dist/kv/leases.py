"""Leases on extents: who may still be reading them. Pure; time is an argument in seconds of one monotonic clock.

A lease ends in one of two ways: its reader releases it in time, or it is expired by force. What was read under a
lease counts only if the release finds it alive and of the generation that was granted.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from vlcache_dist.errors import LeaseLost


@dataclass(slots=True)
class LeaseRecord:
    lease_id: int
    extent_id: int
    generation: int
    expires_at: float


class LeaseTable:
    """Lease ids are never reused. One owner; the object store's lock guards it."""

    def __init__(self) -> None:
        self._leases: dict[int, LeaseRecord] = {}
        self._deadlines: list[tuple[float, int]] = []  # a renewal leaves the old deadline behind; see expire
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[LeaseRecord]:
        return iter(self._leases.values())

    def grant(self, extent_id: int, generation: int, expires_at: float) -> LeaseRecord:
        lease = LeaseRecord(self._next_id, extent_id, generation, expires_at)
        self._next_id += 1
        self._leases[lease.lease_id] = lease
        heapq.heappush(self._deadlines, (expires_at, lease.lease_id))
        return lease

    def renew(self, lease_id: int, generation: int, expires_at: float) -> LeaseRecord:
        """Extend a lease; it never becomes shorter. Raises LeaseLost."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.generation != generation:
            raise LeaseLost(f"lease {lease_id} of generation {generation} is over")
        if expires_at > lease.expires_at:
            lease.expires_at = expires_at
            heapq.heappush(self._deadlines, (expires_at, lease_id))
        return lease

    def release(self, lease_id: int, generation: int) -> LeaseRecord | None:
        """End a lease; None if it is over already or was granted for another generation."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.generation != generation:
            return None
        return self._leases.pop(lease_id)

    def expire(self, now: float) -> list[LeaseRecord]:
        """End every lease whose time is up at ``now``, and return them."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, lease_id = heapq.heappop(self._deadlines)
            lease = self._leases.get(lease_id)
            if lease is not None and lease.expires_at <= now:
                expired.append(self._leases.pop(lease_id))
        return expired
