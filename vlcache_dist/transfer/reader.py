"""READs into an extent of the own store, and what becomes of the extent if they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from vlcache_dist.errors import TransferFailed, TransferTimeout
from vlcache_dist.kv.object_store import Extent, ObjectStore
from vlcache_dist.transfer.base import PeerInfo, Piece, Transfer, Transport

WINDOW = 2  #: READs of one object under way at a time
QUARANTINE_POLL_S = 0.05
TRANSPORT_GRACE_S = 1.0  #: a transport that is so late to say that time is up is not waited for


class ExtentReader:
    """One event loop's. An extent whose READ failed is given back to the store only when nothing can write into it."""

    def __init__(self, store: ObjectStore, transport: Transport, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._transport = transport
        self._clock = clock
        self._tasks: set[asyncio.Task[Any]] = set()

    async def read(
        self,
        peer: PeerInfo,
        extent: Extent,
        pieces: Sequence[Piece],
        deadlines: Sequence[float],
        landed: Callable[[int], None] | None = None,
    ) -> None:
        """READ the pieces into a FILLING extent, each as a transfer of its own, ``WINDOW`` of them at a time: enough to
        keep the wire busy, few enough for the first to arrive first. ``landed(i)`` is called in their order.
        ``deadlines`` are times of the clock, one per piece, ascending.

        Raises TransferFailed or TransferTimeout; the extent is then aborted, or quarantined until every transfer is
        terminal, and no longer the caller's.
        """
        transfers: list[Transfer] = []
        try:
            for index, deadline in enumerate(deadlines):
                while len(transfers) < min(index + WINDOW, len(pieces)):
                    transfers.append(self._start(peer, pieces[len(transfers)], deadlines[len(transfers)]))
                await self._wait(transfers[index], deadline)
                if landed is not None:
                    landed(index)
        except BaseException:
            self._give_up(extent, [transfer for transfer in transfers if not transfer.terminal])
            raise

    async def close(self) -> None:
        """Stop watching quarantined extents: with the transport about to be closed, the store is, too."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background, until ``close``."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self, peer: PeerInfo, piece: Piece, deadline: float) -> Transfer:
        left = deadline - self._clock()
        if left <= 0:
            raise TransferTimeout(f"no time is left to read {piece.nbytes} bytes from {peer.worker_id}")
        try:
            return self._transport.read(peer, [piece], left)
        except ValueError as error:  # a holder that names a range outside its arena
            raise TransferFailed(f"READ from {peer.worker_id}: {error}") from error

    async def _wait(self, transfer: Transfer, deadline: float) -> None:
        waiter = asyncio.wrap_future(transfer.future)
        try:
            left = max(0.0, deadline - self._clock())
            done, _ = await asyncio.wait([waiter], timeout=left + TRANSPORT_GRACE_S)
            if not done:
                raise TransferTimeout("the transport does not answer")
            waiter.result()
        finally:
            waiter.cancel()

    def _give_up(self, extent: Extent, at_risk: Sequence[Transfer]) -> None:
        if at_risk:
            self._store.quarantine(extent)
            self.spawn(self._watch(extent, at_risk))
        else:
            self._store.abort(extent)

    async def _watch(self, extent: Extent, transfers: Sequence[Transfer]) -> None:
        while not all(transfer.terminal for transfer in transfers):  # noqa: ASYNC110 - transports know no event loop
            await asyncio.sleep(QUARANTINE_POLL_S)
        self._store.release_quarantine(extent)
