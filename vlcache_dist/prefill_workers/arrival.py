"""A holder's KV on its way here, told to the engine group by group, and admitted or withdrawn at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from vlcache_dist import wire
from vlcache_dist.engine.bridge import OnEngine
from vlcache_dist.errors import VLCacheError
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.node import Node
from vlcache_dist.types import MediaSpan, ObjectKind


class Arrival:
    """One span's fetch. Its owner awaits ``begun``, gives the engine ``extent`` as a source with ``groups``, and then
    awaits ``follow``; or takes the whole object with ``whole``. ``close`` must come in any case: what was fetched and
    nobody took is let go there."""

    def __init__(self, node: Node, holder: wire.Holder, span: MediaSpan, on_engine: OnEngine) -> None:
        self.holder = holder
        self.groups = node.layer_groups(holder, span)
        self.extent: Extent | None = None
        self._node = node
        self._on_engine = on_engine
        self._name: tuple[str, int] | None = None
        self._layers = 0
        self._begun = asyncio.Event()
        self._taken = False
        self._fetching = asyncio.create_task(
            node.fetch(holder, ObjectKind.KV, span, on_group=self._group, on_extent=self._begin)
        )

    @property
    def over(self) -> bool:
        return self._fetching.done()

    async def begun(self) -> None:
        """Until ``extent`` says where the KV will be, or all of it is here, or nothing will be. Raises nothing."""
        beginning = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait({beginning, self._fetching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beginning.cancel()

    async def whole(self) -> Extent:
        """The object, committed and pinned for the caller. Raises as ``Node.fetch``."""
        extent = await asyncio.shield(self._fetching)
        self._taken = True
        return extent

    async def follow(self, request_id: str, index: int) -> VLCacheError | None:
        """Tell the engine, which has ``extent`` as the span's source, of every further group, and of the end: admitted
        (None), or withdrawn (why). Raises WorkerLost if the engine is gone."""
        self._name = (request_id, index)
        self._tell(self._layers)
        try:
            extent = await asyncio.shield(self._fetching)
        except VLCacheError as error:
            await asyncio.shield(_awaited(self._on_engine(lambda engine: engine.revoke(request_id, index))))
            return error
        self._taken = True  # by the engine, whatever becomes of the request
        try:
            await asyncio.shield(_awaited(self._on_engine(lambda engine: engine.admit(request_id, index, extent))))
        except VLCacheError:
            self._node.store.unpin(extent)
            raise
        return None

    async def close(self) -> None:
        """Idempotent."""
        self._name = None
        self._fetching.cancel()
        (outcome,) = await asyncio.gather(self._fetching, return_exceptions=True)
        if isinstance(outcome, Extent) and not self._taken:
            self._taken = True
            self._node.store.unpin(outcome)

    def _begin(self, extent: Extent) -> None:
        self.extent = extent
        self._begun.set()

    def _group(self, extent: Extent, start: int, stop: int) -> None:
        self.extent, self._layers = extent, stop
        self._tell(stop)

    def _tell(self, layers: int) -> None:
        if self._name is None:
            return
        request_id, index = self._name
        told = asyncio.ensure_future(
            _awaited(self._on_engine(lambda engine: engine.arrived(request_id, index, layers)))
        )
        told.add_done_callback(_retrieve)


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _retrieve(told: asyncio.Future[None]) -> None:
    """An engine that is gone is noticed at the end."""
    if not told.cancelled():
        told.exception()
