"""Which image KV this worker is computing now: the single flight inside one process, beside the directory's claims."""

from __future__ import annotations

import asyncio

from vlcache_dist.types import ContentKey


class LocalProduction:
    """One event loop's. ``begin`` and ``end`` come in pairs."""

    def __init__(self) -> None:
        self._ended: dict[ContentKey, asyncio.Event] = {}

    def __len__(self) -> int:
        return len(self._ended)

    def begin(self, key: ContentKey) -> bool:
        """Become the producer; False if there is one already."""
        if key in self._ended:
            return False
        self._ended[key] = asyncio.Event()
        return True

    def end(self, key: ContentKey) -> None:
        """Production has ended, with an object or without: wake those who wait. Raises KeyError if it never began."""
        self._ended.pop(key).set()

    def active(self, key: ContentKey) -> bool:
        return key in self._ended

    async def wait(self, key: ContentKey, timeout_s: float) -> None:
        """Until the production of ``key`` has ended, or time is up; at once if nobody produces it."""
        ended = self._ended.get(key)
        if ended is None:
            return
        try:
            await asyncio.wait_for(ended.wait(), timeout_s)
        except TimeoutError:
            return
