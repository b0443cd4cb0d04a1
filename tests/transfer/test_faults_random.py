"""Many thousand fetches among workers that freeze, die, restart, evict, recompute, damage and delay: whatever is
admitted is right, at once and for as long as it is used, and afterwards no element is missing.

``VLCACHE_TRANSFER_FAULTS`` sets the number of fetches."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence

import torch
from virtual_cluster import Cluster, Worker, content, key, variant
from virtual_time import run_virtual

from vlcache_dist import wire
from vlcache_dist.errors import ObjectGone, StoreFull, VLCacheError, WorkerLost
from vlcache_dist.transfer.base import PeerInfo, Piece
from vlcache_dist.transfer.fetch import FetchLimits
from vlcache_dist.transfer.memory import Fault
from vlcache_dist.types import ObjectKind

FETCHES = int(os.environ.get("VLCACHE_TRANSFER_FAULTS", "3000"))
HOSTS = {"a": "east", "b": "east", "c": "west"}
NUM_KEYS = 5
READERS_PER_WORKER = 3
LIMITS = FetchLimits(lease_s=1.0, transfer_s=0.7, control_s=0.9, group_bytes=64)


class Chaos:
    def __init__(self, seed: int, fetches: int) -> None:
        self.random = random.Random(seed)
        self.left = fetches
        self.cluster = Cluster(self.fault, self.rpc_delay, LIMITS)
        self.hints: dict[tuple[ObjectKind, int], list[wire.Holder]] = {}
        self.next_variant = 1
        self.variant_of: dict[bytes, bytes] = {}  # by how an object begins: a prefix does not say its variant
        self.outcomes: Counter[str] = Counter()
        self.readers: dict[str, list[asyncio.Task[None]]] = {}
        for address, host in HOSTS.items():
            self.start(address, host)

    # -- scripts ------------------------------------------------------------------------------------------------

    def fault(self, reader: PeerInfo, peer: PeerInfo, pieces: Sequence[Piece]) -> Fault:
        self.outcomes["READs"] += 1
        roll, draw = self.random.random(), self.random.uniform
        if roll < 0.50:
            return Fault(delay_s=draw(0, 0.1))
        if roll < 0.70:
            return Fault(delay_s=draw(0.1, 0.45))
        if roll < 0.80:
            return Fault(delay_s=draw(0.45, 3.0))
        if roll < 0.85:
            return Fault(delay_s=draw(0, 0.3), duplicate_s=draw(0, 2.0))
        if roll < 0.90:
            return Fault(delay_s=draw(0, 0.3), error=True)
        if roll < 0.91:
            return Fault(drop=True)
        # Within a host nothing looks for damage, by policy: there is none.
        return Fault(delay_s=draw(0, 0.3), corrupt=reader.host != peer.host)

    def rpc_delay(self) -> float:
        roll = self.random.random()
        return self.random.uniform(0, 0.005) if roll < 0.9 else self.random.uniform(0.01, 0.8)

    # -- actors -------------------------------------------------------------------------------------------------

    def start(self, address: str, host: str) -> None:
        worker = self.cluster.start(address, host, elements=3000)
        self.readers[address] = [asyncio.create_task(self.read(worker)) for _ in range(READERS_PER_WORKER)]

    async def read(self, worker: Worker) -> None:
        while self.left > 0:
            await asyncio.sleep(self.random.uniform(0, 0.05))
            kind, index = self.random.choice(list(ObjectKind)[:2]), self.random.randrange(NUM_KEYS)
            others = [h for h in self.hints.get((kind, index), ()) if h.address != worker.address]
            if not others or self.random.random() < 0.03:
                self.produce(worker, kind, index)
                continue
            self.left -= 1
            if self.random.random() < 0.1:
                await self.hand_over(worker, index)
            else:
                await self.fetch(worker, self.random.choice(others), kind, index)

    def produce(self, worker: Worker, kind: ObjectKind, index: int) -> None:
        made_by = variant(self.next_variant)
        self.next_variant += 1
        try:
            extent = worker.put(kind, key(index), made_by, self.size(kind, index))
        except StoreFull:
            self.outcomes["could not produce"] += 1
            return
        self.variant_of[_beginning(worker.view(extent))] = made_by
        self.hint(worker.holds(extent), kind, index)

    def hint(self, holder: wire.Holder, kind: ObjectKind, index: int) -> None:
        hints = self.hints.setdefault((kind, index), [])
        hints.append(holder)
        del hints[:-4]

    @staticmethod
    def size(kind: ObjectKind, index: int) -> int:
        tokens = 4 + 3 * index
        return tokens * (32 if kind is ObjectKind.KV else 8)

    async def fetch(self, worker: Worker, holder: wire.Holder, kind: ObjectKind, index: int) -> None:
        size = self.size(kind, index)
        prefix = 8 * self.random.randint(1, 4) if kind is ObjectKind.EMBEDDING and self.random.random() < 0.4 else None
        exact = self.random.random() < 0.3
        groups: list[tuple[int, int]] = []
        on_group = (lambda extent, a, b: groups.append((a, b))) if kind is ObjectKind.KV else None
        work = worker.fetcher.fetch(
            holder, kind, key(index), size, prefix=prefix, exact_variant=exact, on_group=on_group
        )
        patience = self.random.uniform(0, 0.4) if self.random.random() < 0.1 else 60.0
        try:
            extent = await asyncio.wait_for(work, patience)
        except VLCacheError as error:
            self.outcomes[error.code] += 1
            if isinstance(error, ObjectGone | WorkerLost):  # as the directory does that hears of a stale hint
                self.hints[kind, index] = [h for h in self.hints[kind, index] if h != holder]
            return
        except TimeoutError:
            self.outcomes["cancelled"] += 1
            return
        self.outcomes["admitted"] += 1
        if on_group is not None:
            assert [a for a, _ in groups] == [0, *(b for _, b in groups)][:-1], "groups in order, without gaps"
            assert groups[-1][1] == 4
        if prefix is None:
            assert not exact or extent.variant == holder.variant
            expected = content(kind, key(index), extent.variant, size)
        else:
            made_by = self.variant_of.get(_beginning(worker.view(extent)))
            assert made_by is not None, f"wrong bytes of {extent}"
            expected = content(kind, key(index), made_by, size)[:prefix]
        assert torch.equal(worker.view(extent), expected), f"wrong bytes of {extent}"
        await asyncio.sleep(self.random.choice([0.0, 0.05, 0.5]))
        assert torch.equal(worker.view(extent), expected), f"bytes of {extent} changed in use"
        worker.store.unpin(extent)
        if prefix is not None:
            worker.store.discard(extent)
        else:
            self.hint(worker.holds(extent), kind, index)

    async def hand_over(self, worker: Worker, index: int) -> None:
        """Packed rows, leased for ``worker`` by one of the others."""
        holder = self.random.choice([w for w in self.cluster.workers.values() if w is not worker])
        made_by, size = variant(self.next_variant), self.size(ObjectKind.KV, index)
        self.next_variant += 1
        try:
            packed = holder.store.stage(size, self.cluster.loop.time())
        except StoreFull:
            self.outcomes["could not produce"] += 1
            return
        expected = content(ObjectKind.KV, key(index), made_by, size)
        holder.view(packed).copy_(expected)
        holder.store.commit(packed)
        lease = holder.holder.lease(packed, self.random.uniform(0.1, 2.0))
        try:
            extent = await worker.fetcher.fetch_staging(holder.id, holder.address, lease)
            assert torch.equal(worker.view(extent), expected), f"wrong bytes handed over by {holder.id}"
            worker.store.abort(extent)
            self.outcomes["handed over"] += 1
        except VLCacheError as error:
            self.outcomes[error.code] += 1
        finally:
            holder.store.release(lease.lease_id, lease.generation, self.cluster.loop.time())
            holder.store.discard(packed)

    async def disturb(self) -> None:
        while self.left > 0:
            await asyncio.sleep(self.random.uniform(0, 0.6))
            worker = self.random.choice(list(self.cluster.workers.values()))
            roll = self.random.random()
            if roll < 0.45:
                worker.freeze()
                await asyncio.sleep(self.random.choice([0.05, 0.3, 1.5]))
                worker.thaw()
            elif roll < 0.55:
                await self.restart(worker)
            elif roll < 0.8 and (objects := worker.store.objects()):
                extent = self.random.choice(objects)
                await worker.holder.forget(wire.Forget(extent.key, extent.kind))

    async def restart(self, worker: Worker) -> None:
        for task in self.readers[worker.address]:
            task.cancel()
        await asyncio.gather(*self.readers[worker.address], return_exceptions=True)
        await worker.die()
        self.check_objects(worker)
        self.start(worker.address, worker.transport.info.host)
        self.outcomes["restarts"] += 1

    async def keep_house(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            for worker in self.cluster.workers.values():
                worker.store.expire(self.cluster.loop.time())
                worker.store.validate()

    # -- the run ------------------------------------------------------------------------------------------------

    async def run(self) -> Counter[str]:
        house = asyncio.create_task(self.keep_house())
        await self.disturb()
        while pending := [task for tasks in self.readers.values() for task in tasks if not task.done()]:
            await asyncio.wait(pending)
        for tasks in self.readers.values():
            for task in tasks:
                if not task.cancelled():
                    task.result()
        for worker in self.cluster.workers.values():
            self.check_objects(worker)
        await self.drain()
        house.cancel()
        await asyncio.gather(house, return_exceptions=True)
        return self.outcomes

    def check_objects(self, worker: Worker) -> None:
        """Everything that is committed here is what its name says."""
        for extent in worker.store.objects():
            expected = content(extent.kind, extent.key, extent.variant, extent.elements)
            assert torch.equal(worker.view(extent), expected), f"{worker.id} holds wrong bytes of {extent}"

    async def drain(self) -> None:
        """Peers' deaths end the last READs; then every element is free or holds an object."""
        await asyncio.sleep(5.0)
        for worker in self.cluster.workers.values():
            self.cluster.network.kill(worker.transport.info.agent)
        await asyncio.sleep(5.0)
        for worker in self.cluster.workers.values():
            worker.store.expire(self.cluster.loop.time())
            worker.store.clear()
            worker.store.expire(self.cluster.loop.time())
            await asyncio.sleep(2.0)
            worker.store.expire(self.cluster.loop.time())
            worker.store.validate()
            stats = worker.store.stats()
            assert stats.free == stats.total, stats
            assert stats.num_leases == 0
            await worker.die()


def _beginning(values: torch.Tensor) -> bytes:
    return values[:8].numpy().tobytes()


def test_no_wrong_byte_is_admitted() -> None:
    async def main() -> Counter[str]:
        return await Chaos(seed=1, fetches=FETCHES).run()

    outcomes = run_virtual(main())
    print(dict(outcomes))
    assert outcomes["admitted"] > FETCHES // 6 and outcomes["handed over"] > FETCHES // 100, outcomes
    for kind in (
        "TransferTimeout",
        "TransferFailed",
        "LeaseLost",
        "ChecksumMismatch",
        "ObjectGone",
        "cancelled",
        "restarts",
    ):
        assert outcomes[kind] > 0, (kind, outcomes)
