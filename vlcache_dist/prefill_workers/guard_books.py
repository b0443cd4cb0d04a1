"""A worker's guard and the common books: told and heard with every heartbeat.

While nobody keeps the books, the worker goes on with its own: what it knew, and what it has seen since.
"""

from __future__ import annotations

import asyncio
import logging

from vlcache_dist import wire
from vlcache_dist.node import Node
from vlcache_dist.reuse.guard import Guard

log = logging.getLogger(__name__)


class GuardBooks:
    """Of one worker. ``run`` is to be spawned behind a first ``exchange``."""

    def __init__(self, node: Node, guard: Guard) -> None:
        self._node = node
        self._guard = guard
        self._epoch = ""

    async def run(self) -> None:
        while self._guard.active:
            await asyncio.sleep(self._node.heartbeat_s)
            try:
                await self.exchange()
            except Exception:
                log.exception("the guard's books could not be shared")

    async def exchange(self) -> None:
        """Tell what was seen here, take up what was seen elsewhere. Nothing changes if nobody answers."""
        if not self._guard.active:
            return
        reply = await self._tell(())
        if reply is not None and reply.epoch != self._epoch:
            self._epoch = reply.epoch
            reply = await self._tell(self._guard.common())
        if reply is None or reply.epoch != self._epoch:
            return
        for name, level in self._guard.take_up(reply.standings):
            log.warning("reuse in prompts of format %r is %s now, by all workers' books", name, level.name.lower())

    async def _tell(self, copies: tuple[wire.Standing, ...]) -> wire.SharedBooks | None:
        message = wire.ShareBooks(
            worker_id=self._node.worker_id,
            scope=self._node.layout.model,
            epoch=self._epoch,
            known={s.format: s.rank for s in self._guard.common() if not copies},
            news=self._guard.news,
            copies=copies,
        )
        return await self._node.share_books(message)
