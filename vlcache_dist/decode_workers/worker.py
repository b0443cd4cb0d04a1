"""The decode worker: takes over prefilled sequences and batches them continuously until their last token.

An image's KV comes from the own store if it is there, else once from the prefill worker; only text KV and recomputed
rows travel for every request, and they do while the engine makes room. Plain Python over a ``Node`` and an ``Engine``;
the Ray actor is in ``actor.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import msgspec

from vlcache_dist import wire
from vlcache_dist.decode_workers.takeover import Takeover, give_back
from vlcache_dist.engine.api import Admitted, Import, Mode
from vlcache_dist.engine.bridge import EngineBridge, next_tokens
from vlcache_dist.engine.engine import Engine
from vlcache_dist.engine.warmup import warm_up
from vlcache_dist.errors import EngineError, VLCacheError, WorkerLost
from vlcache_dist.node import Node
from vlcache_dist.rpc import Call

log = logging.getLogger(__name__)


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
        takeover: Takeover | None = None
        try:
            if self.engine.stats().waiting == 0:  # else it would hold room that those before it wait for
                takeover = Takeover(self.node, message, deadline)
            await self._bridge.call(lambda engine: engine.add(generation, time.monotonic(), Mode.DECODE))
            event = await EngineBridge.next_event(queue, deadline)
            if not isinstance(event, Admitted):
                raise EngineError(f"{type(event).__name__} came before admission")
            takeover = takeover or Takeover(self.node, message, deadline)
            handed = await takeover.arrived()
            takeover.take()
            self._release_ticket(message.handoff)
            self._images_fetched += handed.images
            self._handoff_bytes += handed.moved
            # Not to be cancelled half-way: either the engine takes the extents over, or they are given back.
            await asyncio.shield(self.node.spawn(self._import(request_id, message.first_token, handed.kv)))
            moved, images = handed.moved, handed.images
            while not finished:
                tokens = await next_tokens(queue, deadline)
                finished = tokens.finish is not None
                yield msgspec.structs.replace(tokens, bytes_moved=moved, images_moved=images)
                moved = images = 0
        finally:
            if takeover is None or not takeover.taken:
                self._release_ticket(message.handoff)
            await self.node.complete(self._clean_up(request_id, finished, takeover))

    async def _clean_up(self, request_id: str, finished: bool, takeover: Takeover | None) -> None:
        if takeover is not None:
            await takeover.close()
        if not finished:
            with contextlib.suppress(WorkerLost):  # an engine that has stopped holds nothing back
                await self._bridge.call(lambda engine: engine.abort(request_id))
        self._bridge.shut(request_id)

    async def _import(self, request_id: str, first_token: int, kv: Import) -> None:
        try:
            await self._bridge.call(lambda engine: engine.import_sequence(request_id, first_token, kv))
        except BaseException:  # nothing was taken over
            give_back(self.node, kv)
            raise

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
