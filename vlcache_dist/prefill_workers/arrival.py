"""What is on its way here from another worker, told to the engine as it lands, and admitted or withdrawn at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from vlcache_dist import wire
from vlcache_dist.called_off import call_off
from vlcache_dist.engine.bridge import OnEngine
from vlcache_dist.errors import VLCacheError
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.transfer.fetch import OnExtent, OnGroup

Fetch = Callable[[OnGroup, OnExtent], Coroutine[Any, Any, Extent | None]]


class Incoming:
    """One fetch, seen while it runs. ``extent``: where the bytes are going; ``layers``: how many of them are there (of
    encoder output: none, or all). ``drop`` or ``close`` must come in any case: what was fetched and nobody took is let
    go there."""

    def __init__(self, fetch: Fetch, let_go: Callable[[Extent], None]) -> None:
        self.extent: Extent | None = None
        self.layers = 0
        self.told: Callable[[], None] | None = None  #: called whenever more has landed
        self._let_go = let_go
        self._begun = asyncio.Event()
        self._taken = self._dropped = False
        self._task = asyncio.create_task(fetch(self._group, self._begin))

    @property
    def over(self) -> bool:
        return self._task.done()

    async def begun(self) -> None:
        """Until ``extent`` is known, or the fetch is over. Raises nothing."""
        beginning = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait({beginning, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beginning.cancel()

    async def valid(self) -> Extent | None:
        """Until the object is admitted to the own store, pinned; it stays this object's until ``take``. Raises what the
        fetch raises."""
        return await asyncio.shield(self._task)

    def take(self, taken: bool = True) -> None:
        """What ``valid`` returned is the caller's now, or is not after all."""
        self._taken = taken

    def drop(self) -> None:
        """End the fetch, and let go of what it brought unless that was taken. Idempotent. Waits for nothing, so that no
        cancellation can come between."""
        self.told = None
        if not self._dropped:
            self._dropped = True
            call_off(self._task, self._came_in_vain)

    async def close(self) -> None:
        """``drop``, and until the fetch is over."""
        self.drop()
        await asyncio.wait({self._task})

    def _came_in_vain(self, extent: Extent | None) -> None:
        if extent is not None and not self._taken:
            self._let_go(extent)

    def _begin(self, extent: Extent) -> None:
        self.extent = extent
        self._begun.set()

    def _group(self, extent: Extent, start: int, stop: int) -> None:
        self.layers = stop
        if self.told is not None:
            self.told()


class Arrival:
    """One span's KV from ``holder`` in ``groups`` of layers, and the encoder output of the rows to recompute.
    ``rows_arrive``: the engine was told where the latter will be, not that it is there."""

    def __init__(self, holder: wire.Holder, groups: tuple[int, ...], kv: Incoming, rows: Incoming) -> None:
        self.holder, self.groups, self.kv, self.rows = holder, groups, kv, rows
        self.rows_arrive = False

    @property
    def layers(self) -> int:
        """How many layers can be computed: none without the rows' input. (That its fetch is over says nothing: it may
        have failed.)"""
        return self.kv.layers if self.rows.layers or not self.rows_arrive else 0

    async def follow(self, on_engine: OnEngine, request_id: str, index: int) -> VLCacheError | None:
        """Tell the engine, which has both extents as the span's source, of all that lands, and of the end: admitted
        (None), or withdrawn (why). Raises WorkerLost if the engine is gone."""

        def tell() -> None:
            layers = self.layers
            told = asyncio.ensure_future(_awaited(on_engine(lambda engine: engine.arrived(request_id, index, layers))))
            told.add_done_callback(_retrieve)

        self.kv.told = self.rows.told = tell
        tell()
        try:
            kv = await self.kv.valid()
            rows = await self.rows.valid() if self.rows_arrive else None
        except VLCacheError as error:
            await asyncio.shield(_awaited(on_engine(lambda engine: engine.revoke(request_id, index))))
            return error
        assert kv is not None
        taken = [self.kv, *([self.rows] if self.rows_arrive else [])]
        admitting = asyncio.ensure_future(_awaited(on_engine(lambda engine: engine.admit(request_id, index, kv, rows))))
        for incoming in taken:
            incoming.take()  # by the engine, whatever becomes of the request
        try:
            await asyncio.shield(admitting)
        except VLCacheError:
            for incoming in taken:
                incoming.take(False)
            raise
        return None

    def drop(self) -> None:
        """As ``Incoming.drop``, of both."""
        self.kv.drop()
        self.rows.drop()

    async def close(self) -> None:
        """``drop``, and until both fetches are over."""
        self.drop()
        await self.kv.close()
        await self.rows.close()


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _retrieve(told: asyncio.Future[None]) -> None:
    """An engine that is gone is noticed at the end."""
    if not told.cancelled():
        told.exception()
