"""The decode worker: takes over prefilled sequences and batches them continuously until their last token.

An image's KV comes from the own store if it is there, else once from the prefill worker; only text KV and recomputed
rows travel for every request. Plain Python over a ``Node`` and an ``Engine``; the Ray actor is in ``actor.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import msgspec

from vlcache_dist import wire
from vlcache_dist.engine.api import Admitted, Import, Mode
from vlcache_dist.engine.bridge import EngineBridge, next_tokens
from vlcache_dist.engine.engine import Engine
from vlcache_dist.engine.warmup import warm_up
from vlcache_dist.errors import EngineError, StoreFull, TransferFailed, VLCacheError, WorkerLost
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.node import Node
from vlcache_dist.rpc import Call
from vlcache_dist.types import ObjectKind

log = logging.getLogger(__name__)
ROOM_PATIENCE_S, ROOM_PAUSE_S = 5.0, 0.02  #: with a store that is full of what is in use


class DecodeWorker:
    """Owns the engine."""

    def __init__(self, node: Node, engine: Engine) -> None:
        self.node = node
        self.engine = engine
        self._bridge = EngineBridge(engine, lambda event: None, name=f"{node.name}-engine")
        self._images_fetched = 0
        self._handoff_bytes = 0
        node.handle(wire.Decode, self.decode)
        node.on_load(self.load)
        node.on_status(self.status)
        node.on_health(lambda: self._bridge.healthy)

    async def start(self) -> None:
        await asyncio.to_thread(warm_up, self.engine)
        self._bridge.start()
        await self.node.start()

    async def close(self) -> None:
        await self.node.close()
        await self._bridge.close()

    def load(self) -> wire.WorkerLoad:
        stats = self.engine.stats()
        return wire.WorkerLoad(
            running=stats.running,
            waiting=stats.waiting,
            kv_blocks_free=stats.blocks_free,
            kv_blocks_total=stats.blocks_total,
        )

    async def status(self) -> dict[str, object]:
        stats = await self._bridge.call(lambda engine: engine.stats())
        return {
            "engine": msgspec.to_builtins(stats),
            "kv_bytes": self.engine.runner.pages.nbytes,
            "graphs": msgspec.to_builtins(self.engine.runner.graph_report()),
            "images_fetched": self._images_fetched,
            "handoff_bytes": self._handoff_bytes,
        }

    async def decode(self, message: wire.Decode, call: Call) -> AsyncIterator[wire.Tokens]:
        """Handler of ``wire.Decode``. Leaving it early frees everything; the ticket is released in any case."""
        generation = message.generation
        request_id = generation.request_id
        deadline = asyncio.get_running_loop().time() + message.timeout_s
        queue = self._bridge.open(request_id)
        finished = False
        taken = False
        try:
            await self._bridge.call(lambda engine: engine.add(generation, time.monotonic(), Mode.DECODE))
            event = await EngineBridge.next_event(queue, deadline)
            if not isinstance(event, Admitted):
                raise EngineError(f"{type(event).__name__} came before admission")
            kv, moved, images = await self._take_with_patience(message, deadline)
            taken = True
            self._release_ticket(message.handoff)
            # Not to be cancelled half-way: either the engine takes the extents over, or they are given back.
            await asyncio.shield(self.node.spawn(self._import(request_id, message.first_token, kv)))
            while not finished:
                tokens = await next_tokens(queue, deadline)
                finished = tokens.finish is not None
                yield msgspec.structs.replace(tokens, bytes_moved=moved, images_moved=images)
                moved = images = 0
        finally:
            if not taken:
                self._release_ticket(message.handoff)
            await self.node.complete(self._clean_up(request_id, finished))

    async def _clean_up(self, request_id: str, finished: bool) -> None:
        if not finished:
            with contextlib.suppress(WorkerLost):  # an engine that has stopped holds nothing back
                await self._bridge.call(lambda engine: engine.abort(request_id))
        self._bridge.shut(request_id)

    async def _import(self, request_id: str, first_token: int, kv: Import) -> None:
        try:
            await self._bridge.call(lambda engine: engine.import_sequence(request_id, first_token, kv))
        except BaseException:  # nothing was taken over
            for extent in kv.objects.values():
                self.node.store.unpin(extent)
            if kv.staging is not None:
                self.node.store.abort(kv.staging)
            raise

    async def _take_with_patience(self, message: wire.Decode, deadline: float) -> tuple[Import, int, int]:
        """``_take``, waiting for room if the store is full of what other requests hold for a moment."""
        loop = asyncio.get_running_loop()
        give_up = min(deadline, loop.time() + ROOM_PATIENCE_S)
        while True:
            try:
                return await self._take(message)
            except StoreFull as error:
                if loop.time() + ROOM_PAUSE_S > give_up:
                    raise TransferFailed(
                        f"no room for the handoff from {message.handoff.worker_id}: {error}"
                    ) from error
            await asyncio.sleep(ROOM_PAUSE_S)

    async def _take(self, message: wire.Decode) -> tuple[Import, int, int]:
        """The handoff's KV in this worker's arena: (what to import, bytes moved, image objects fetched)."""
        handoff, store = message.handoff, self.node.store
        objects: dict[int, Extent] = {}
        staging: Extent | None = None
        moved = images = 0
        try:
            for span in handoff.spans:
                extent = store.lookup(ObjectKind.KV, span.key, span.variant, pin=True)
                if extent is None:
                    nbytes = (
                        message.generation.spans[span.index].length
                        * self.node.layout.kv_token
                        * self.node.layout.itemsize
                    )
                    holder = wire.Holder(handoff.worker_id, handoff.address, span.variant, nbytes)
                    media = message.generation.spans[span.index]
                    extent = await self.node.fetch(holder, ObjectKind.KV, media, exact_variant=True)
                    moved += nbytes
                    images += 1
                objects[span.index] = extent
            if handoff.staging is not None:
                staging = await self.node.fetch_staging(handoff.worker_id, handoff.address, handoff.staging)
                moved += handoff.staging.nbytes
        except BaseException as error:
            for extent in objects.values():
                store.unpin(extent)
            if isinstance(error, VLCacheError) and not isinstance(error, StoreFull):
                raise TransferFailed(f"the handoff from {handoff.worker_id} failed: {error}") from error
            raise
        moved *= self.node.layout.tp_size  # so much in every shard
        self._images_fetched += images
        self._handoff_bytes += moved
        return Import(handoff.num_tokens, handoff.rows, objects, staging), moved, images

    def _release_ticket(self, handoff: wire.Handoff) -> None:
        """Tell the prefill worker, without waiting for it; if the word is lost, the ticket expires there."""

        async def release() -> None:
            try:
                await self.node.client.call(handoff.address, wire.ReleaseHandoff(handoff.ticket), timeout_s=5.0)
            except VLCacheError as error:
                log.warning(
                    "the prefill worker %s did not hear that %s is released: %s",
                    handoff.worker_id,
                    handoff.ticket,
                    error,
                )

        self.node.spawn(release())
