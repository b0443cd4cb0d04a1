"""Workers with stores, holders and fetchers on one in-memory network, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from vlcache_dist import wire
from vlcache_dist.errors import DeadlineExceeded, WorkerLost
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.transfer.fetch import Fetcher, FetchLimits
from vlcache_dist.transfer.holder import HolderService
from vlcache_dist.transfer.memory import NO_FAULT, MemoryNetwork, MemoryTransport, Script
from vlcache_dist.types import ContentKey, ObjectKind, Variant

LAYOUT = KVLayout(num_layers=4, num_kv_heads=1, head_dim=4, hidden=8, dtype="float32", model="tiny")
LIMITS = FetchLimits(lease_s=1.0, transfer_s=0.5, control_s=0.4, group_bytes=64)


def key(index: int) -> ContentKey:
    return bytes([index]) * 32


def variant(index: int) -> Variant:
    return index.to_bytes(16, "big")


def content(kind: ObjectKind, name: ContentKey, made_by: Variant, elements: int) -> torch.Tensor:
    """What an object holds: other bytes for every variant."""
    seed = int.from_bytes(made_by, "big") * 1009 + name[0] * 7 + len(kind)
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


class Worker:
    def __init__(
        self,
        cluster: Cluster,
        address: str,
        worker_id: str,
        host: str,
        elements: int,
        layout: KVLayout,
        limits: FetchLimits,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.cluster = cluster
        self.address = address
        self.layout = layout
        self.arena = torch.full((elements,), float("nan"))
        self.store = ObjectStore(elements, max_lease_s=limits.lease_s)
        self.transport = MemoryTransport(cluster.network, worker_id, self.arena, layout, host)
        self.holder = HolderService(self.store, self.arena, self.transport, clock=loop.time)
        self.fetcher = Fetcher(self.store, layout, self.transport, cluster.call, limits, clock=loop.time)
        self.alive = True
        self.awake = asyncio.Event()
        self.awake.set()

    @property
    def id(self) -> str:
        return self.transport.info.worker_id

    def put(self, kind: ObjectKind, name: ContentKey, made_by: Variant, elements: int) -> Extent:
        """Compute an object, as it were."""
        extent = self.store.begin(kind, name, made_by, elements, self.cluster.loop.time())
        self.view(extent).copy_(content(kind, name, made_by, elements))
        return self.store.commit(extent)

    def view(self, extent: Extent) -> torch.Tensor:
        return self.arena[extent.offset : extent.offset + extent.elements]

    def holds(self, extent: Extent) -> wire.Holder:
        return wire.Holder(self.id, self.address, extent.variant, extent.elements * self.layout.itemsize)

    def freeze(self) -> None:
        self.cluster.network.freeze(self.transport.info.agent)
        self.awake.clear()

    def thaw(self) -> None:
        self.awake.set()
        self.cluster.network.thaw(self.transport.info.agent)

    async def die(self) -> None:
        self.alive = False
        self.awake.set()
        self.transport.close()
        await self.fetcher.close()


class Cluster:
    """``rpc_delay(message) -> seconds`` for each way of a call."""

    def __init__(
        self,
        script: Script = lambda reader, peer, pieces: NO_FAULT,
        rpc_delay: Callable[[], float] = lambda: 0.0001,
        limits: FetchLimits = LIMITS,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.network = MemoryNetwork(script, clock=self.loop.time, call_later=self.loop.call_later)
        self.workers: dict[str, Worker] = {}
        self.rpc_delay = rpc_delay
        self.limits = limits
        self.tamper: Callable[[wire.Message], wire.Message] = lambda reply: reply
        self.calls: list[str] = []
        self._incarnations = itertools.count(1)

    def start(self, address: str, host: str | None = None, elements: int = 4096, layout: KVLayout = LAYOUT) -> Worker:
        """A worker at ``address``; one that was there before is replaced."""
        worker_id = f"{address}#{next(self._incarnations)}"
        worker = Worker(self, address, worker_id, host or address, elements, layout, self.limits)
        self.workers[address] = worker
        return worker

    async def call(self, address: str, message: wire.Message, *, timeout_s: float) -> wire.Message:
        """As ``RpcClient.call``; messages go through their encoding."""
        try:
            return await asyncio.wait_for(self._serve(address, message), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{address} did not answer in {timeout_s} s") from None

    async def _serve(self, address: str, message: wire.Message) -> wire.Message:
        self.calls.append(type(message).__name__)
        await asyncio.sleep(self.rpc_delay())
        worker = self.workers[address]
        await worker.awake.wait()
        if not worker.alive:
            raise WorkerLost(f"nobody listens at {address}")
        holder: Any = worker.holder
        handler = getattr(holder, type(message).__name__.lower())
        reply = await handler(_encoded(message))
        await asyncio.sleep(self.rpc_delay())
        return self.tamper(_encoded(reply))


def _encoded(message: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
