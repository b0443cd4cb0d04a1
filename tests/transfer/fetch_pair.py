"""A holder and a reader in virtual time, for tests of the fetch protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from virtual_cluster import LAYOUT, LIMITS, Cluster, content, key, variant
from virtual_time import run_virtual

from vlcache_dist.kv.object_store import Extent
from vlcache_dist.transfer.fetch import FetchLimits
from vlcache_dist.transfer.memory import Fault
from vlcache_dist.types import ObjectKind

KV = ObjectKind.KV
TOKENS = 6
SIZE = LAYOUT.kv_elements(TOKENS)

Scenario = Callable[[], Coroutine[Any, Any, None]]


def virtual(scenario: Scenario) -> Callable[[], None]:
    """A test in virtual time."""

    def test() -> None:
        run_virtual(scenario())

    test.__name__ = scenario.__name__
    test.__doc__ = scenario.__doc__
    return test


class Pair:
    """A holder with one KV object, and a reader on another host."""

    def __init__(self, fault: Fault = Fault(), same_host: bool = False, limits: FetchLimits = LIMITS) -> None:
        self.fault = fault
        self.cluster = Cluster(lambda reader, peer, pieces: self.fault, limits=limits)
        self.holder = self.cluster.start("holder", host="h0")
        self.reader = self.cluster.start("reader", host="h0" if same_host else "h1")
        self.object = self.holder.put(KV, key(1), variant(1), SIZE)
        self.hint = self.holder.holds(self.object)

    async def fetch(self, **options: Any) -> Extent:
        return await self.reader.fetcher.fetch(self.hint, KV, key(1), SIZE, **options)

    def right(self, extent: Extent) -> bool:
        return torch.equal(self.reader.view(extent), content(KV, key(1), extent.variant, SIZE))

    async def settle(self) -> None:
        """Both stores hold objects only: nothing filling, leased, pinned or in quarantine."""
        await asyncio.sleep(3.0)
        for worker in (self.holder, self.reader):
            worker.store.expire(self.cluster.loop.time())
            worker.store.validate()
            stats = worker.store.stats()
            assert (stats.filling, stats.quarantined, stats.pinned, stats.leased, stats.num_leases) == (0, 0, 0, 0, 0)


async def refused(work: Coroutine[Any, Any, Any], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        await work
    return str(caught.value)
