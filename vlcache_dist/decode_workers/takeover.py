"""A handoff's KV on its way into this worker's arena: image objects that are not here yet, and the rows that were
shipped, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from vlcache_dist import wire
from vlcache_dist.called_off import call_off
from vlcache_dist.engine.api import Import
from vlcache_dist.errors import StoreFull, TransferFailed, VLCacheError
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.node import Node
from vlcache_dist.types import ObjectKind

ROOM_PATIENCE_S, ROOM_PAUSE_S = 5.0, 0.02  #: with a store that is full of what is in use


@dataclass(frozen=True, slots=True)
class Handed:
    """What to import; the bytes that moved for it, of all shards; how many image objects were fetched."""

    kv: Import
    moved: int
    images: int


class Takeover:
    """Of one sequence; begins at once. ``drop`` or ``close`` must come in any case: what arrived and nobody took is
    given back there. ``deadline`` is on the loop's clock."""

    def __init__(self, node: Node, message: wire.Decode, deadline: float) -> None:
        self.taken = False
        self._node = node
        self._message = message
        self._dropped = False
        self._task = asyncio.create_task(self._with_patience(deadline))

    async def arrived(self) -> Handed:
        """Until all of it is here; it stays this object's until ``take``. Raises TransferFailed, or what the loop
        raises."""
        return await asyncio.shield(self._task)

    def take(self) -> None:
        """What ``arrived`` returned is the caller's."""
        self.taken = True

    def drop(self) -> None:
        """End it. Idempotent; waits for nothing."""
        if not self._dropped:
            self._dropped = True
            call_off(self._task, self._came_in_vain)

    async def close(self) -> None:
        """``drop``, and until it is over."""
        self.drop()
        await asyncio.wait({self._task})

    def _came_in_vain(self, handed: Handed) -> None:
        if not self.taken:
            give_back(self._node, handed.kv)

    async def _with_patience(self, deadline: float) -> Handed:
        """Waits for room if the store is full of what other requests hold for a moment."""
        loop = asyncio.get_running_loop()
        give_up = min(deadline, loop.time() + ROOM_PATIENCE_S)
        source = self._message.handoff.worker_id
        while True:
            try:
                return await self._fetch()
            except StoreFull as error:
                if loop.time() + ROOM_PAUSE_S > give_up:
                    raise TransferFailed(f"no room for the handoff from {source}: {error}") from error
            except VLCacheError as error:
                raise TransferFailed(f"the handoff from {source} failed: {error}") from error
            await asyncio.sleep(ROOM_PAUSE_S)

    async def _fetch(self) -> Handed:
        handoff, store = self._message.handoff, self._node.store
        here: dict[int | None, Extent] = {}  # None: the staging extent
        fetches: dict[int | None, asyncio.Task[Extent]] = {}
        for span in handoff.spans:
            extent = store.lookup(ObjectKind.KV, span.key, span.variant, pin=True)
            if extent is None:
                fetches[span.index] = asyncio.create_task(self._image(span))
            else:
                here[span.index] = extent
        if handoff.staging is not None:
            fetches[None] = asyncio.create_task(self._rows(handoff.staging))
        try:
            await asyncio.gather(*fetches.values())
        except BaseException:
            give_back(self._node, _import(handoff, here))
            for index, task in fetches.items():
                call_off(task, partial(self._alone_in_vain, index))
            await asyncio.wait(fetches.values())
            raise
        images = [self._image_bytes(index) for index in fetches if index is not None]
        rows = 0 if handoff.staging is None else handoff.staging.nbytes
        moved = (sum(images) + rows) * self._node.layout.tp_size  # so much in every shard
        here |= {index: task.result() for index, task in fetches.items()}
        return Handed(_import(handoff, here), moved, len(images))

    def _alone_in_vain(self, index: int | None, extent: Extent) -> None:
        give_back(self._node, _import(self._message.handoff, {index: extent}))

    async def _image(self, span: wire.HandoffSpan) -> Extent:
        handoff = self._message.handoff
        holder = wire.Holder(handoff.worker_id, handoff.address, span.variant, self._image_bytes(span.index))
        media = self._message.generation.spans[span.index]
        return await self._node.fetch(holder, ObjectKind.KV, media, exact_variant=True)

    async def _rows(self, lease: wire.Lease) -> Extent:
        handoff = self._message.handoff
        return await self._node.fetch_staging(handoff.worker_id, handoff.address, lease)

    def _image_bytes(self, index: int) -> int:
        layout = self._node.layout
        return self._message.generation.spans[index].length * layout.kv_token * layout.itemsize


def give_back(node: Node, kv: Import) -> None:
    """What was not imported after all."""
    for extent in kv.objects.values():
        node.store.unpin(extent)
    if kv.staging is not None:
        node.store.abort(kv.staging)


def _import(handoff: wire.Handoff, extents: Mapping[int | None, Extent]) -> Import:
    objects = {index: extent for index, extent in extents.items() if index is not None}
    return Import(handoff.num_tokens, handoff.rows, objects, extents.get(None))
