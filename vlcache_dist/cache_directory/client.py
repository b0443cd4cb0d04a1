"""The cache directory as its members see it: shards by rendezvous hashing, heartbeats, and hints that never fail.

Whatever goes wrong with the directory costs time, never a request: a shard that does not answer knows nothing and
grants every claim, and until it answers a heartbeat or a poll again, requests do not ask it. A shard that lost its
state (another epoch, or a heartbeat it does not recognize) or missed an announcement is told everything again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from vlcache_dist import wire
from vlcache_dist.cache_directory.fingerprint import fingerprint
from vlcache_dist.cache_directory.hashing import ranked
from vlcache_dist.cache_directory.membership import MemberList
from vlcache_dist.errors import VLCacheError
from vlcache_dist.rpc import RpcClient
from vlcache_dist.types import ContentKey, ObjectKind, Variant, WorkerId

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
COMPARE_EVERY = 2  #: heartbeats, between comparisons of what is held with what is believed
BATCH_S = 0.002  #: announcements made within this time travel together
MEMBERS_EVERY_S = 0.25
RENEWED_S = 600.0  #: how long a claim is renewed: longer than a request, so that only one that was forgotten runs out

Addresses = Callable[[], Awaitable[Sequence[str]]]
Name = tuple[ObjectKind, ContentKey]


@dataclass(slots=True, eq=False)
class _Claim:
    """One that this worker has, or has asked for. Times are the event loop's."""

    ttl_s: float
    renew_at: float
    renew_until: float


class _Shard:
    """What this process knows of one shard, and what it still has to tell it."""

    def __init__(self, number: int, address: str) -> None:
        self.number = number
        self.address = address
        self.reachable = True
        self.replaced = False  # a later worker of our name is the member there
        self.epoch: str | None = None  # that this worker's inventory was announced to; None: announce all
        self.here: list[wire.Entry] = []
        self.gone: list[tuple[ContentKey, ObjectKind, Variant]] = []
        self.claimed: dict[Name, _Claim] = {}  # granted by this shard and not ended yet
        self.unclaimed: set[Name] = set()  # to be told
        self.wake = asyncio.Event()
        self.heartbeats = 0
        self.differed: tuple[int, int] | None = None  # what was held here and believed there, when last compared
        self.corrected: tuple[int, int] | None = None  # the same, when everything was announced for it


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
        if info is not None and not info.started:
            info = msgspec.structs.replace(info, started=time.time())
        self._info = info
        self._load = load
        self._inventory = inventory
        self._watch = watch_members
        self._shards: list[_Shard] = []
        self._members = MemberList()
        self._tasks: list[asyncio.Task[None]] = []
        self._resolving: asyncio.Task[None] | None = None
        self._heartbeat_s = 0.5
        self.draining = False

    async def start(self) -> None:
        """Resolve, register everywhere, start the background tasks. Raises what ``resolve`` raises."""
        self._shards = [_Shard(number, address) for number, address in enumerate(await self._resolve())]
        if self._info is not None:
            await asyncio.gather(*map(self._register, self._shards))
            for shard in self._shards:
                self._tasks += [asyncio.create_task(self._heartbeats(shard)), asyncio.create_task(self._speak(shard))]
        if self._watch:
            await self._poll_members()
            self._tasks.append(asyncio.create_task(self._watch_members()))

    async def close(self) -> None:
        """Leave every shard."""
        tasks = [*self._tasks, *([self._resolving] if self._resolving is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        if self._info is not None:
            message = wire.Unregister(self._info.worker_id)
            await asyncio.gather(*(self._ask(s, message, 0.5) for s in self._shards if s.reachable))

    # -- objects ------------------------------------------------------------------------------------------------

    def announce(self, entry: wire.Entry) -> None:
        """Tell the directory of a committed object, soon. Ends this worker's claim on it."""
        shard = self._shard(entry.key)
        shard.here.append(entry)
        shard.claimed.pop((entry.kind, entry.key), None)
        shard.wake.set()

    def retract(self, key: ContentKey, kind: ObjectKind, variant: Variant) -> None:
        """Tell the directory that an object is gone, soon."""
        shard = self._shard(key)
        shard.gone.append((key, kind, variant))
        shard.wake.set()

    async def report_stale(self, holder: WorkerId, key: ContentKey, kind: ObjectKind, variant: Variant) -> None:
        """A holder said, or showed by dying, that it no longer has an object."""
        await self._ask(self._shard(key), wire.Retract(holder, ((key, kind, variant),)))

    async def lookup(self, keys: Sequence[ContentKey]) -> list[wire.KeyState]:
        """What is known of each key; nothing, where a shard does not answer."""
        by_shard: dict[_Shard, list[ContentKey]] = {}
        for key in dict.fromkeys(keys):
            by_shard.setdefault(self._shard(key), []).append(key)
        replies = await asyncio.gather(
            *(self._ask(shard, wire.Lookup(tuple(part))) for shard, part in by_shard.items())
        )
        known: dict[ContentKey, wire.KeyState] = {}
        for reply in replies:
            if isinstance(reply, wire.Found):
                known |= {state.key: state for state in reply.states}
        return [known.get(key) or wire.KeyState(key, None) for key in keys]

    async def claim(self, kind: ObjectKind, key: ContentKey, ttl_s: float) -> wire.ClaimReply:
        """Granted, too, if the shard does not answer: then two may produce the same, and both are right. A claim whose
        granting nobody has seen (the caller was cancelled, the shard too slow) is given back. It is renewed until it
        ends, so ``ttl_s`` bounds how long others wait for a worker that has lost touch, not the production."""
        assert self._info is not None, "only workers claim"
        shard, name = self._shard(key), (kind, key)
        now = asyncio.get_running_loop().time()
        shard.claimed[name] = _Claim(ttl_s, now + ttl_s / 2, now + RENEWED_S)
        shard.unclaimed.discard(name)
        granted = False
        try:
            reply = await self._ask(shard, wire.Claim(self._info.worker_id, key, kind, ttl_s))
            if isinstance(reply, wire.ClaimReply):
                granted = reply.granted
                if not granted:
                    shard.claimed.pop(name, None)
                return reply
            return wire.ClaimReply(True)
        finally:
            if not granted and name in shard.claimed:
                self.unclaim(kind, key)

    def unclaim(self, kind: ObjectKind, key: ContentKey) -> None:
        """Give up a claim, soon; one that is over is ignored."""
        shard, name = self._shard(key), (kind, key)
        if shard.claimed.pop(name, None) is not None:
            shard.unclaimed.add(name)
            shard.wake.set()

    async def wait_for(self, kind: ObjectKind, key: ContentKey, timeout_s: float) -> tuple[wire.Holder, ...]:
        """Until the object has a holder or nobody produces it any more; empty if there is none then."""
        reply = await self._ask(self._shard(key), wire.Await(key, kind, timeout_s), timeout_s + CALL_TIMEOUT_S)
        return reply.holders if isinstance(reply, wire.Awaited) else ()

    # -- the guard's books --------------------------------------------------------------------------------------

    @property
    def heartbeat_s(self) -> float:
        """As the directory asked for."""
        return self._heartbeat_s

    async def share_books(self, message: wire.ShareBooks) -> wire.SharedBooks | None:
        """The first shard keeps them all; None if it does not answer."""
        reply = await self._ask(self._shards[0], message)
        return reply if isinstance(reply, wire.SharedBooks) else None

    # -- members ------------------------------------------------------------------------------------------------

    def members(self) -> tuple[wire.Member, ...]:
        """The latest list (``watch_members``)."""
        return self._members.members

    async def _watch_members(self) -> None:
        while True:
            await asyncio.sleep(MEMBERS_EVERY_S)
            await self._poll_members()

    async def _poll_members(self) -> None:
        """From every shard: one that has just been restarted does not know everybody yet."""
        replies = await asyncio.gather(*(self._ask(s, wire.ListMembers(), probe=True) for s in self._shards))
        known = [reply for reply in replies if isinstance(reply, wire.Members)]
        self._members.update(known, asyncio.get_running_loop().time())

    # -- keeping in touch ---------------------------------------------------------------------------------------

    async def _register(self, shard: _Shard) -> None:
        assert self._info is not None
        reply = await self._ask(shard, wire.Register(self._info), probe=True)
        if not isinstance(reply, wire.Registered):
            return
        self._heartbeat_s = reply.heartbeat_s
        if reply.replaced:
            if not shard.replaced:
                log.warning("directory shard %d has a later worker named %s", shard.number, self._info.name)
            shard.replaced = True
            return
        shard.replaced = False
        shard.here.clear()  # part of the inventory
        entries = tuple(e for e in self._inventory() if self._shard(e.key) is shard)
        announced = not entries or await self._ask(shard, wire.Announce(self._info.worker_id, entries)) is not None
        if announced:
            shard.epoch = reply.epoch

    async def _heartbeats(self, shard: _Shard) -> None:
        assert self._info is not None
        while True:
            await asyncio.sleep(self._heartbeat_s)
            try:
                message = wire.Heartbeat(self._info.worker_id, self._load(), self.draining)
                reply = await self._ask(shard, message, probe=True)
                if not isinstance(reply, wire.HeartbeatAck):
                    continue
                if not reply.known or reply.epoch != shard.epoch:
                    if not shard.replaced:
                        log.warning("directory shard %d lacks what is held here; announcing again", shard.number)
                    await self._register(shard)
                    for claim in shard.claimed.values():
                        claim.renew_at = 0.0  # lost with the rest
                else:
                    await self._compare(shard, reply.held)
                await self._renew(shard)
                if shard.unclaimed:
                    shard.wake.set()
            except Exception:
                log.exception("a heartbeat to directory shard %d failed", shard.number)

    async def _compare(self, shard: _Shard, believed: int) -> None:
        """Announce again what the shard no longer believes to be here (a reader was wrong about it, a message lost).
        Twice the same difference: what is on its way does not count. Once for each: what it alone believes cannot be
        helped from here, and is found out by those who come for it."""
        assert self._info is not None
        shard.heartbeats += 1
        if shard.heartbeats % COMPARE_EVERY or shard.here or shard.gone:
            return
        entries = tuple(e for e in self._inventory() if self._shard(e.key) is shard)
        held = 0
        for entry in entries:
            held ^= fingerprint(entry.kind, entry.key, entry.variant)
        difference = None if held == believed else (held, believed)
        before, shard.differed = shard.differed, difference
        if difference is None:
            shard.corrected = None
        elif difference == before and difference != shard.corrected:
            log.info("directory shard %d believes other objects to be here: announcing %d", shard.number, len(entries))
            shard.corrected = difference
            await self._ask(shard, wire.Announce(self._info.worker_id, entries))

    async def _renew(self, shard: _Shard) -> None:
        """Claims that are half over, whose objects are still being produced. One that somebody else got meanwhile, or
        that is held elsewhere by now, is forgotten: both productions are right."""
        assert self._info is not None
        now = asyncio.get_running_loop().time()
        for name, claim in list(shard.claimed.items()):
            if not claim.renew_at <= now < claim.renew_until or shard.claimed.get(name) is not claim:
                continue
            claim.renew_at = now + claim.ttl_s / 2
            kind, key = name
            reply = await self._ask(shard, wire.Claim(self._info.worker_id, key, kind, claim.ttl_s))
            if not isinstance(reply, wire.ClaimReply):
                claim.renew_at = now  # with the next heartbeat that is answered
            elif name not in shard.claimed:
                if reply.granted:  # it ended here while it was being renewed there
                    shard.unclaimed.add(name)
                    shard.wake.set()
            elif not reply.granted and shard.claimed[name] is claim:
                del shard.claimed[name]

    async def _speak(self, shard: _Shard) -> None:
        """Send what the shard is to be told, in batches; after a failure, it is told everything."""
        assert self._info is not None
        own = self._info.worker_id
        while True:
            await shard.wake.wait()
            await asyncio.sleep(BATCH_S)
            shard.wake.clear()
            here, shard.here = tuple(shard.here), []
            gone, shard.gone = tuple(shard.gone), []
            unclaimed = tuple(shard.unclaimed)
            heard = True
            if gone:
                heard &= await self._ask(shard, wire.Retract(own, gone)) is not None
            if here:
                heard &= await self._ask(shard, wire.Announce(own, here)) is not None
            if not heard:
                shard.epoch = None
            for kind, key in unclaimed:
                if (kind, key) not in shard.unclaimed:
                    continue  # claimed again meanwhile
                if await self._ask(shard, wire.Unclaim(own, key, kind)) is not None:
                    shard.unclaimed.discard((kind, key))

    def _shard(self, key: ContentKey) -> _Shard:
        """Rendezvous hashing over shard numbers: a shard keeps its keys when its address changes."""
        return self._shards[int(ranked(key, [str(shard.number) for shard in self._shards])[0])]

    async def _ask(
        self, shard: _Shard, message: wire.Message, timeout_s: float = CALL_TIMEOUT_S, *, probe: bool = False
    ) -> wire.Message | None:
        """The reply; None if the shard does not answer. Its address is then looked up again, and only probes are sent
        there until one is answered."""
        if not (shard.reachable or probe):
            return None
        address = shard.address
        try:
            reply = await self._rpc.call(address, message, timeout_s=timeout_s)
        except VLCacheError as error:
            if shard.reachable:
                log.warning("directory shard %d did not answer %s: %s", shard.number, type(message).__name__, error)
            if shard.address == address:
                shard.reachable = False
                self._look_up_again()
            return None
        if not shard.reachable:
            log.info("directory shard %d answers again", shard.number)
        shard.reachable = True
        return reply

    def _look_up_again(self) -> None:
        if self._resolving is None or self._resolving.done():
            self._resolving = asyncio.create_task(self._look_up())

    async def _look_up(self) -> None:
        try:
            addresses = list(await self._resolve())
        except Exception as error:
            log.warning("the directory's addresses cannot be had: %s: %s", type(error).__name__, error)
            return
        if len(addresses) != len(self._shards):
            log.warning("the directory has %d shards now, and %d before", len(addresses), len(self._shards))
            return
        for shard, address in zip(self._shards, addresses, strict=True):
            shard.address = address
