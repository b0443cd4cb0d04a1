"""The cache directory as its members see it: shards by rendezvous hashing, heartbeats, and hints that never fail.

Whatever goes wrong with the directory costs time, never a request: an unreachable shard knows nothing, and grants
every claim. A shard that lost its state (another epoch, or a heartbeat it does not recognize) is told everything again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from vlcache_dist import wire
from vlcache_dist.cache_directory.hashing import ranked
from vlcache_dist.errors import VLCacheError
from vlcache_dist.rpc import RpcClient
from vlcache_dist.types import ContentKey, ObjectKind, Variant, WorkerId

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
BATCH_S = 0.002  #: announcements made within this time travel together
MEMBERS_EVERY_S = 0.25

Addresses = Callable[[], Awaitable[Sequence[str]]]


class DirectoryClient:
    """One event loop's. ``resolve`` returns the shards' addresses in shard order, anew whenever one does not answer.

    A worker gives ``info`` (it registers and heartbeats), ``load`` and ``inventory`` (what to announce to a shard that
    knows nothing); an ingress gives none of them. With ``watch_members`` the list of members is kept up to date.
    """

    def __init__(
        self,
        rpc: RpcClient,
        resolve: Addresses,
        *,
        info: wire.WorkerInfo | None = None,
        load: Callable[[], wire.WorkerLoad] = wire.WorkerLoad,
        inventory: Callable[[], Sequence[wire.Entry]] = tuple,
        watch_members: bool = False,
    ) -> None:
        self._rpc = rpc
        self._resolve = resolve
        self._info = info
        self._load = load
        self._inventory = inventory
        self._watch = watch_members
        self._shards: list[str] = []
        self._epochs: dict[int, str] = {}
        self._members: tuple[wire.Member, ...] = ()
        self._announcing: list[wire.Entry] = []
        self._retracting: list[tuple[ContentKey, ObjectKind, Variant]] = []
        self._batch = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._heartbeat_s = 0.5
        self.draining = False

    async def start(self) -> None:
        """Resolve, register everywhere, start the background tasks. Raises what ``resolve`` raises."""
        self._shards = list(await self._resolve())
        if self._info is not None:
            await asyncio.gather(*(self._register(shard) for shard in range(len(self._shards))))
            self._tasks += [asyncio.create_task(self._heartbeats(shard)) for shard in range(len(self._shards))]
            self._tasks.append(asyncio.create_task(self._send_batches()))
        if self._watch:
            await self._poll_members()
            self._tasks.append(asyncio.create_task(self._watch_members()))

    async def close(self) -> None:
        """Leave every shard."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._info is not None:
            message = wire.Unregister(self._info.worker_id)
            await asyncio.gather(*(self._try(shard, message, 0.5) for shard in range(len(self._shards))))

    # -- objects ------------------------------------------------------------------------------------------------

    def announce(self, entry: wire.Entry) -> None:
        """Tell the directory of a committed object, soon."""
        self._announcing.append(entry)
        self._batch.set()

    def retract(self, key: ContentKey, kind: ObjectKind, variant: Variant) -> None:
        """Tell the directory that an object is gone, soon."""
        self._retracting.append((key, kind, variant))
        self._batch.set()

    async def report_stale(self, holder: WorkerId, key: ContentKey, kind: ObjectKind, variant: Variant) -> None:
        """A holder said, or showed by dying, that it no longer has an object."""
        await self._try(self._shard(key), wire.Retract(holder, ((key, kind, variant),)))

    async def lookup(self, keys: Sequence[ContentKey]) -> list[wire.KeyState]:
        """What is known of each key; nothing, where a shard does not answer."""
        by_shard: dict[int, list[ContentKey]] = {}
        for key in dict.fromkeys(keys):
            by_shard.setdefault(self._shard(key), []).append(key)
        replies = await asyncio.gather(
            *(self._try(shard, wire.Lookup(tuple(part))) for shard, part in by_shard.items())
        )
        known: dict[ContentKey, wire.KeyState] = {}
        for reply in replies:
            if isinstance(reply, wire.Found):
                known |= {state.key: state for state in reply.states}
        return [known.get(key) or wire.KeyState(key, None) for key in keys]

    async def claim(self, kind: ObjectKind, key: ContentKey, ttl_s: float) -> wire.ClaimReply:
        """Granted, too, if the shard does not answer: then two may produce the same, and both are right."""
        assert self._info is not None, "only workers claim"
        reply = await self._try(self._shard(key), wire.Claim(self._info.worker_id, key, kind, ttl_s))
        return reply if isinstance(reply, wire.ClaimReply) else wire.ClaimReply(True)

    async def unclaim(self, kind: ObjectKind, key: ContentKey) -> None:
        assert self._info is not None, "only workers claim"
        await self._try(self._shard(key), wire.Unclaim(self._info.worker_id, key, kind))

    async def wait_for(self, kind: ObjectKind, key: ContentKey, timeout_s: float) -> tuple[wire.Holder, ...]:
        """Until the object has a holder or nobody produces it any more; empty if there is none then."""
        reply = await self._try(self._shard(key), wire.Await(key, kind, timeout_s), timeout_s + CALL_TIMEOUT_S)
        return reply.holders if isinstance(reply, wire.Awaited) else ()

    # -- members ------------------------------------------------------------------------------------------------

    def members(self) -> tuple[wire.Member, ...]:
        """The latest list (``watch_members``)."""
        return self._members

    async def _watch_members(self) -> None:
        while True:
            await asyncio.sleep(MEMBERS_EVERY_S)
            await self._poll_members()

    async def _poll_members(self) -> None:
        """From the first shard that answers: every member is registered at every shard."""
        for shard in range(len(self._shards)):
            reply = await self._try(shard, wire.ListMembers())
            if isinstance(reply, wire.Members):
                self._members = reply.members
                return

    # -- keeping in touch ---------------------------------------------------------------------------------------

    async def _register(self, shard: int) -> None:
        assert self._info is not None
        reply = await self._try(shard, wire.Register(self._info))
        if not isinstance(reply, wire.Registered):
            return
        self._heartbeat_s = reply.heartbeat_s
        self._epochs[shard] = reply.epoch
        entries = tuple(e for e in self._inventory() if self._shard(e.key) == shard)
        if entries:
            await self._try(shard, wire.Announce(self._info.worker_id, entries))

    async def _heartbeats(self, shard: int) -> None:
        assert self._info is not None
        while True:
            await asyncio.sleep(self._heartbeat_s)
            reply = await self._try(shard, wire.Heartbeat(self._info.worker_id, self._load(), self.draining))
            if isinstance(reply, wire.HeartbeatAck) and (not reply.known or reply.epoch != self._epochs.get(shard)):
                log.warning("directory shard %d has lost its state; announcing again", shard)
                await self._register(shard)

    async def _send_batches(self) -> None:
        assert self._info is not None
        while True:
            await self._batch.wait()
            await asyncio.sleep(BATCH_S)
            self._batch.clear()
            entries, self._announcing = self._announcing, []
            objects, self._retracting = self._retracting, []
            messages: list[tuple[int, wire.Message]] = []
            for shard in range(len(self._shards)):
                gone = tuple(o for o in objects if self._shard(o[0]) == shard)
                here = tuple(e for e in entries if self._shard(e.key) == shard)
                if gone:
                    messages.append((shard, wire.Retract(self._info.worker_id, gone)))
                if here:
                    messages.append((shard, wire.Announce(self._info.worker_id, here)))
            for shard, message in messages:
                await self._try(shard, message)

    def _shard(self, key: ContentKey) -> int:
        """Rendezvous hashing over shard numbers: a shard keeps its keys when its address changes."""
        return int(ranked(key, [str(shard) for shard in range(len(self._shards))])[0])

    async def _try(self, shard: int, message: wire.Message, timeout_s: float = CALL_TIMEOUT_S) -> wire.Message | None:
        """The reply; None if the shard does not answer, whose address is then looked up again."""
        try:
            return await self._rpc.call(self._shards[shard], message, timeout_s=timeout_s)
        except VLCacheError as error:
            log.warning("directory shard %d did not answer %s: %s", shard, type(message).__name__, error)
        try:
            addresses = list(await self._resolve())
        except VLCacheError as error:
            log.warning("the directory's addresses cannot be had: %s", error)
            return None
        if len(addresses) == len(self._shards):
            self._shards = addresses
        return None
