"""What every process of the system stands on: an RPC server and client, the directory, and for workers a store with
its arena and the transport.

Plain asyncio, no Ray: a worker is built in a test with two lines. One event loop owns a node.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec
import torch

from vlcache_dist import wire
from vlcache_dist.cache_directory.client import Addresses, DirectoryClient
from vlcache_dist.cache_directory.hashing import ranked
from vlcache_dist.errors import LayoutMismatch, ObjectGone, Overloaded, TransferFailed, VLCacheError, WorkerLost
from vlcache_dist.kv.arena import Arena, free_bytes
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.rpc import Call, Handler, RpcClient, RpcServer
from vlcache_dist.transfer.base import Transport
from vlcache_dist.transfer.fetch import Fetcher, FetchLimits, OnExtent, OnGroup
from vlcache_dist.transfer.holder import HolderService
from vlcache_dist.transfer.link import Link
from vlcache_dist.types import ContentKey, MediaSpan, ObjectKind, Role, Variant, WorkerId

log = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.1
MEET_AGAIN_S = 3.0  #: between attempts to read from a peer
READS_FROM = {
    Role.ENCODER: (),
    Role.PREFILL: (Role.ENCODER, Role.PREFILL, Role.DECODE, Role.COLOCATED),
    Role.DECODE: (Role.PREFILL, Role.COLOCATED),
    Role.COLOCATED: (Role.ENCODER, Role.PREFILL, Role.DECODE, Role.COLOCATED),
}
CLAIM_TTL_S = 60.0
DRAINABLE = (wire.Prefill, wire.Decode, wire.Encode)  #: what a draining worker refuses


class FrontNode:
    """RPC and directory without a store: what the ingress needs."""

    def __init__(self, host: str, directory: Addresses) -> None:
        self._server = RpcServer(host)
        self.client = RpcClient()
        self._resolve = directory
        self._tasks: set[asyncio.Task[Any]] = set()
        self._spawning = True
        self._directory = DirectoryClient(self.client, directory, watch_members=True)

    @property
    def address(self) -> str:
        return self._server.address

    def handle(self, kind: type[wire.Message], handler: Handler) -> None:
        self._server.handle(kind, handler)

    async def start(self) -> None:
        await self._server.start()
        await self._directory.start()

    async def close(self) -> None:
        """Leave the directory, so that nobody is sent here any more; end every call and what runs in the background."""
        await self._directory.close()
        await self._server.close()
        self._spawning = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run in the background until done, or until ``close``; a failure is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if not self._spawning:
            task.cancel()
        return task

    async def complete(self, work: Coroutine[Any, Any, Any]) -> None:
        """Await ``work`` to its end, even if the caller is cancelled meanwhile: for what a handler owes when it ends.
        The cancellation is raised afterwards."""
        task = self.spawn(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)

    def members(self) -> Sequence[wire.Member]:
        """The directory's latest list of workers."""
        return self._directory.members()

    def encoders(self, key: ContentKey) -> list[str]:
        """Addresses of living encoders, the one that is to take ``key`` first. Ranked by their stable names: one that
        was restarted takes its own keys again, and no others move."""
        encoders = (m.info for m in self.members() if m.info.role is Role.ENCODER and not m.info.draining)
        addresses = {info.name: info.address for info in sorted(encoders, key=lambda info: info.started)}  # newest wins
        return [addresses[name] for name in ranked(key, list(addresses))]

    async def lookup(self, keys: Sequence[ContentKey]) -> list[wire.KeyState]:
        """What the directory knows of each key."""
        return await self._directory.lookup(keys)


class Node(FrontNode):
    """A worker's. ``name`` is stable (``prefill-0``); the worker id carries the incarnation.

    ``make_transport(worker_id)`` is called once. Handlers are added with ``handle`` before ``start``.
    """

    def __init__(
        self,
        *,
        name: str,
        role: Role,
        host: str,
        directory: Addresses,
        arena: Arena,
        store: ObjectStore,
        make_transport: Callable[[WorkerId], Transport],
        limits: FetchLimits | None = None,
    ) -> None:
        super().__init__(host, directory)
        self.name = name
        self.role = role
        self.worker_id: WorkerId = f"{name}#{uuid.uuid4().hex[:12]}"
        self.arena = arena
        self.layout: KVLayout = arena.layout
        self.store = store
        self.transport = make_transport(self.worker_id)
        self._holder = HolderService(store, arena.tensor, self.transport)
        self._fetcher = Fetcher(store, self.layout, self.transport, self.client.call, limits or FetchLimits())
        self._load: Callable[[], wire.WorkerLoad] = wire.WorkerLoad
        self._status: Callable[[], Any] = dict
        self._health: Callable[[], bool] = lambda: True
        self._links: dict[WorkerId, Link | None] = {}  # as probed when the peer appeared; None: not readable
        self._meet_at: dict[WorkerId, float] = {}  # peers, and when to probe them (again)
        self._draining = False
        self._closed = False
        holder: dict[type[wire.Message], Callable[[Any], Awaitable[wire.Message]]] = {
            wire.Hello: self._holder.hello,
            wire.Acquire: self._holder.acquire,
            wire.Renew: self._holder.renew,
            wire.Release: self._holder.release,
            wire.Forget: self._holder.forget,
        }
        for kind, handler in holder.items():
            super().handle(kind, _without_call(handler))
        super().handle(wire.Status, self._report)
        super().handle(wire.Drain, self._drain)

    # -- life ---------------------------------------------------------------------------------------------------

    def handle(self, kind: type[wire.Message], handler: Handler) -> None:
        super().handle(kind, self._unless_draining(handler) if kind in DRAINABLE else handler)

    def on_load(self, load: Callable[[], wire.WorkerLoad]) -> None:
        """What heartbeats say of the role's own queues; the store's figures are added here."""
        self._load = load

    def on_status(self, status: Callable[[], dict[str, Any] | Awaitable[dict[str, Any]]]) -> None:
        self._status = status

    def on_health(self, healthy: Callable[[], bool]) -> None:
        self._health = healthy

    @property
    def healthy(self) -> bool:
        return not self._closed and self._health()

    async def start(self) -> None:
        """Listen, then join the directory."""
        await self._server.start()
        info = wire.WorkerInfo(self.worker_id, self.name, self.role, self.address, self.transport.info)
        self._directory = DirectoryClient(
            self.client,
            self._resolve,
            info=info,
            load=self.load,
            inventory=lambda: [self._entry(extent) for extent in self.store.objects() if extent.meta is not None],
            watch_members=True,
        )
        await self._directory.start()
        self.spawn(self._housekeeping())

    async def close(self) -> None:
        """Leave the directory, end every call, stop the transport."""
        self._closed = True
        await super().close()
        await self._fetcher.close()
        await asyncio.to_thread(self.transport.close)

    def load(self) -> wire.WorkerLoad:
        stats, itemsize = self.store.stats(), self.layout.itemsize
        return msgspec.structs.replace(
            self._load(),
            store_bytes_used=(stats.total - stats.free) * itemsize,
            store_bytes_total=stats.total * itemsize,
            read_bytes_per_s={
                peer: 0.0 if link is None or self._fetcher.refuses(peer) else link.bytes_per_s
                for peer, link in self._links.items()
            },
            read_latency_s={peer: link.latency_s for peer, link in self._links.items() if link is not None},
        )

    # -- objects here -------------------------------------------------------------------------------------------

    def begin(self, kind: ObjectKind, span: MediaSpan, variant: Variant, *, private: bool = False) -> Extent:
        """An extent for a span's object, to be filled; a private one is never announced. Raises StoreFull."""
        return self.store.begin(
            kind,
            span.key,
            variant,
            self.elements(kind, span.length),
            time.monotonic(),
            meta=None if private else _meta(span),
        )

    def put(self, kind: ObjectKind, span: MediaSpan, rows: torch.Tensor, *, private: bool = False) -> Extent:
        """Copy encoder output [length, hidden] into the store and commit it. Raises StoreFull."""
        extent = self.begin(kind, span, uuid.uuid4().bytes, private=private)
        try:
            self.arena.embedding_view(extent, span.length).copy_(rows)
            if self.arena.tensor.is_cuda:
                torch.cuda.current_stream(self.arena.tensor.device).synchronize()
        except BaseException:
            self.store.abort(extent)
            raise
        return self.store.commit(extent)

    def elements(self, kind: ObjectKind, num_tokens: int) -> int:
        layout = self.layout
        return layout.kv_elements(num_tokens) if kind is ObjectKind.KV else layout.embedding_elements(num_tokens)

    def announce(self, extent: Extent) -> None:
        """Tell the directory of a committed object, unless it is private."""
        if extent.meta is not None:
            self._directory.announce(self._entry(extent))

    def holder_of(self, extent: Extent) -> wire.Holder:
        return wire.Holder(self.worker_id, self.address, extent.variant, extent.elements * self.layout.itemsize)

    def lease(self, extent: Extent, ttl_s: float) -> wire.Lease:
        """Let another worker read a committed extent (of any kind) for so long."""
        return self._holder.lease(extent, ttl_s)

    # -- objects elsewhere --------------------------------------------------------------------------------------

    async def holders(self, kind: ObjectKind, key: ContentKey) -> tuple[wire.Holder, ...]:
        """Who announced the object: hints, see ``holders_in``."""
        return self.holders_in(await self.state(key), kind)

    def holders_in(self, state: wire.KeyState, kind: ObjectKind) -> tuple[wire.Holder, ...]:
        """Holders to try, in this order. Decode workers come last: what they send delays tokens."""
        decoding = {m.info.worker_id for m in self.members() if m.info.role is Role.DECODE}
        found = state.kv if kind is ObjectKind.KV else state.embedding
        return tuple(sorted(found, key=lambda holder: holder.worker_id in decoding))

    async def fetch(
        self,
        holder: wire.Holder,
        kind: ObjectKind,
        span: MediaSpan,
        *,
        rows: int | None = None,
        exact_variant: bool = False,
        private: bool = False,
        on_group: OnGroup | None = None,
        on_extent: OnExtent | None = None,
    ) -> Extent:
        """A holder's object, here, pinned for the caller and (unless only its first ``rows`` are wanted, or it is
        ``private``) announced. ``on_group``, ``on_extent``: see ``Fetcher.fetch``. Raises CacheError, WorkerLost or
        DeadlineExceeded; the directory is told of a hint that proved stale."""
        elements = self.elements(kind, span.length)
        prefix = None if rows is None or rows >= span.length else rows * self.layout.hidden
        try:
            extent = await self._fetcher.fetch(
                holder,
                kind,
                span.key,
                elements,
                prefix=prefix,
                exact_variant=exact_variant,
                meta=None if private else _meta(span),
                on_group=on_group,
                on_extent=on_extent,
            )
        except (ObjectGone, WorkerLost, TransferFailed, LayoutMismatch):
            # Awaited: a claim that follows must not be refused because of the hint.
            await self._directory.report_stale(holder.worker_id, span.key, kind, holder.variant)
            raise
        if prefix is None:
            self.announce(extent)
        return extent

    def layer_groups(self, holder: wire.Holder, span: MediaSpan) -> tuple[int, ...]:
        """Edges of the groups of layers in which ``fetch`` with ``on_group`` brings a span's KV."""
        return self._fetcher.layer_groups(holder.worker_id, self.layout.kv_elements(span.length))

    async def fetch_staging(self, worker_id: WorkerId, address: str, lease: wire.Lease) -> Extent:
        """A handoff's packed rows, here, in a staging extent that the caller aborts after use."""
        return await self._fetcher.fetch_staging(worker_id, address, lease)

    def forget(self, address: str, kind: ObjectKind, key: ContentKey) -> None:
        """Tell a holder that an object will not be used again; nobody waits for it."""

        async def tell() -> None:
            try:
                await self.client.call(address, wire.Forget(key, kind), timeout_s=2.0)
            except VLCacheError as error:
                log.info("%s was not told to forget: %s", address, error)

        self.spawn(tell())

    async def state(self, key: ContentKey) -> wire.KeyState:
        """What the directory knows of a key."""
        (state,) = await self._directory.lookup([key])
        return state

    # -- the guard's books --------------------------------------------------------------------------------------

    @property
    def heartbeat_s(self) -> float:
        return self._directory.heartbeat_s

    async def share_books(self, message: wire.ShareBooks) -> wire.SharedBooks | None:
        """Tell the common books, and hear from them; None if nobody keeps them now."""
        return await self._directory.share_books(message)

    # -- single flight ------------------------------------------------------------------------------------------

    async def claim(self, kind: ObjectKind, key: ContentKey) -> wire.ClaimReply:
        return await self._directory.claim(kind, key, CLAIM_TTL_S)

    def unclaim(self, kind: ObjectKind, key: ContentKey) -> None:
        self._directory.unclaim(kind, key)

    async def await_key(self, kind: ObjectKind, key: ContentKey, timeout_s: float) -> None:
        """Until the object is announced, its producer gives up, or time is up."""
        await self._directory.wait_for(kind, key, timeout_s)

    # -- inside -------------------------------------------------------------------------------------------------

    def _entry(self, extent: Extent) -> wire.Entry:
        return wire.Entry(extent.key, extent.kind, extent.variant, extent.elements * self.layout.itemsize, extent.meta)

    async def _housekeeping(self) -> None:
        """Expire leases, tell the directory what was evicted, meet new peers."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                self.store.expire(time.monotonic())
                for extent in self.store.take_evictions():
                    if extent.meta is not None:
                        self._directory.retract(extent.key, extent.kind, extent.variant)
                self._meet_peers()
                if not self._health() and not self._draining:
                    log.error("%s is not healthy, and takes no more requests", self.worker_id)
                    self._draining = self._directory.draining = True
            except Exception:
                log.exception("housekeeping of %s failed", self.worker_id)

    def _meet_peers(self) -> None:
        """Connect to every worker that this one may read from, before a request has to wait for it."""
        here = {m.info.worker_id: m.info for m in self.members() if m.info.role in READS_FROM[self.role]}
        here.pop(self.worker_id, None)
        for worker_id in [w for w in self._meet_at if w not in here]:
            del self._meet_at[worker_id]
            self._links.pop(worker_id, None)
            self._fetcher.forget_peer(worker_id)
        now = time.monotonic()
        for worker_id, info in here.items():
            if self._meet_at.get(worker_id, now) <= now:
                self._meet_at[worker_id] = math.inf
                self.spawn(self._meet(worker_id, info.address))

    async def _meet(self, worker_id: WorkerId, address: str) -> None:
        try:
            link = await self._fetcher.introduce(worker_id, address)
        except VLCacheError as error:
            log.warning("%s cannot read from %s: %s", self.worker_id, worker_id, error)
            link = None
        if link is not None and link.slow:
            log.warning(
                "%s READS FROM %s AT %.3f GB/s ONLY, below the floor of %.3f: images are computed anew rather than "
                "fetched from there%s. Check UCX_TLS, the network, GPU peer access",
                self.worker_id,
                worker_id,
                link.bytes_per_s / 1e9,
                link.floor / 1e9,
                "" if self._fetcher.refuses(worker_id) else " where that is faster",
            )
        if worker_id in self._meet_at:
            self._links[worker_id] = link
            if link is None:
                self._meet_at[worker_id] = time.monotonic() + MEET_AGAIN_S

    async def status(self) -> dict[str, Any]:
        """What ``wire.Status`` answers with. Raises WorkerLost if the engine has stopped."""
        own = self._status()
        if inspect.isawaitable(own):
            own = await own
        stats = self.store.stats()
        return {
            "worker_id": self.worker_id,
            "address": self.address,
            "pid": os.getpid(),
            "healthy": self.healthy,
            "draining": self._draining,
            "device": str(self.arena.tensor.device),
            "tensor_parallel": self.layout.tp_size,
            "store": {name: getattr(stats, name) for name in stats.__slots__},
            "store_itemsize": self.layout.itemsize,
            "store_bytes": self.arena.tensor.nbytes,
            "device_free_bytes": free_bytes(self.arena.tensor.device),
            "transfers": {
                "reads": self._fetcher.reads,
                "bytes_read": self._fetcher.bytes_read,
                "failures": dict(self._fetcher.failures),
                "links": {
                    peer: _link_report(link) | {"refused": self._fetcher.refuses(peer)}
                    for peer, link in self._links.items()
                },
            },
            **own,
        }

    async def _report(self, message: wire.Status, call: Call) -> wire.StatusReply:
        return wire.StatusReply(await self.status())

    async def _drain(self, message: wire.Drain, call: Call) -> wire.Ok:
        self._draining = self._directory.draining = True
        return wire.Ok()

    def _unless_draining(self, handler: Handler) -> Handler:
        if inspect.isasyncgenfunction(handler):

            async def stream(message: Any, call: Call) -> Any:
                self._refuse_if_draining()
                async for item in handler(message, call):  # type: ignore[union-attr]
                    yield item

            return stream

        async def unary(message: Any, call: Call) -> Any:
            self._refuse_if_draining()
            return await handler(message, call)  # type: ignore[misc]

        return unary

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise Overloaded(f"{self.name} is draining")


def _link_report(link: Link | None) -> dict[str, Any]:
    """For ``status``: what was measured when the peer appeared; READs only (``transfer.link`` says why)."""
    if link is None:
        return {"readable": False}
    return {
        "readable": True,
        "gbps": link.bytes_per_s / 1e9,
        "latency_us": link.latency_s * 1e6,
        "group_bytes": link.group_bytes,
        "below_floor": link.slow,
        "curve": [{"bytes": nbytes, "us": seconds * 1e6} for nbytes, seconds in link.points],
    }


def _meta(span: MediaSpan) -> wire.MediaMeta:
    return wire.MediaMeta(span.modality, span.grid, span.second_per_grid)


def _without_call(handler: Callable[[Any], Awaitable[Any]]) -> Handler:
    async def handle(message: Any, call: Call) -> Any:
        return await handler(message)

    return handle
