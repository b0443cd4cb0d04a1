"""One shard of the cache directory on the network: the state machine behind an RPC server, long polls, a timer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlcache_dist import wire
from vlcache_dist.cache_directory.guard_books import GuardBooks
from vlcache_dist.cache_directory.state import DirectoryState, Name
from vlcache_dist.rpc import Call, Handler, RpcServer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiters:
    """Those who wait for one name."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    count: int = 0


class DirectoryServer:
    """Owns its state; ``heartbeat_s`` and ``expiry_s`` are what members are told to keep."""

    def __init__(self, host: str = "127.0.0.1", *, heartbeat_s: float = 0.5, expiry_s: float = 3.0) -> None:
        self.state = DirectoryState(uuid.uuid4().hex, expiry_s=expiry_s)
        self.guard_books = GuardBooks(self.state.epoch)
        self._heartbeat_s = heartbeat_s
        self._waiters: dict[Name, _Waiters] = {}
        self._timer: asyncio.Task[None] | None = None
        self.rpc = RpcServer(host)
        handlers: dict[type[wire.Message], Handler] = {
            wire.Register: self._register,
            wire.Unregister: self._unregister,
            wire.Heartbeat: self._heartbeat,
            wire.ListMembers: self._members,
            wire.Announce: self._announce,
            wire.Retract: self._retract,
            wire.Lookup: self._lookup,
            wire.Claim: self._claim,
            wire.Unclaim: self._unclaim,
            wire.Await: self._await,
            wire.ShareBooks: self._share_books,
            wire.Status: self._status,
        }
        for kind, handler in handlers.items():
            self.rpc.handle(kind, handler)

    async def start(self, port: int | None = None) -> str:
        """Listen on ``port``, or a free one; returns the address."""
        address = await self.rpc.start(port)
        self._timer = asyncio.create_task(self._expire())
        return address

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self.rpc.close()

    async def _expire(self) -> None:
        period = self.state.expiry_s / 6
        before = time.monotonic()
        while True:
            await asyncio.sleep(period)
            now = time.monotonic()
            overslept, before = now - before > 2 * period, now
            if overslept:
                continue  # this process was stopped: heartbeats that came meanwhile are still to be read
            try:
                self._wake(self.state.expire(now))
            except Exception:
                log.exception("expiring members and claims failed")

    def _wake(self, names: Iterable[Name]) -> None:
        for name in names:
            if (waiters := self._waiters.pop(name, None)) is not None:
                waiters.event.set()

    async def _register(self, message: wire.Register, call: Call) -> wire.Registered:
        woken = self.state.register(message.info, time.monotonic())
        self._wake(woken or ())
        return wire.Registered(self.state.epoch, self._heartbeat_s, self.state.expiry_s, replaced=woken is None)

    async def _unregister(self, message: wire.Unregister, call: Call) -> wire.Ok:
        self._wake(self.state.remove(message.worker_id, time.monotonic(), "left"))
        return wire.Ok()

    async def _heartbeat(self, message: wire.Heartbeat, call: Call) -> wire.HeartbeatAck:
        known = self.state.heartbeat(message.worker_id, message.load, message.draining, time.monotonic())
        return wire.HeartbeatAck(self.state.epoch, known, self.state.held(message.worker_id))

    async def _members(self, message: wire.ListMembers, call: Call) -> wire.Members:
        return wire.Members(self.state.epoch, self.state.members(message.role, time.monotonic()))

    async def _announce(self, message: wire.Announce, call: Call) -> wire.Ok:
        self._wake(self.state.announce(message, time.monotonic()))
        return wire.Ok()

    async def _retract(self, message: wire.Retract, call: Call) -> wire.Ok:
        for key, kind, variant in message.objects:
            self.state.retract(message.worker_id, (kind, key), variant, time.monotonic())
        return wire.Ok()

    async def _lookup(self, message: wire.Lookup, call: Call) -> wire.Found:
        return wire.Found(self.state.epoch, tuple(self.state.lookup(key) for key in message.keys))

    async def _claim(self, message: wire.Claim, call: Call) -> wire.ClaimReply:
        return self.state.claim(message, time.monotonic())

    async def _unclaim(self, message: wire.Unclaim, call: Call) -> wire.Ok:
        self._wake(self.state.unclaim(message.worker_id, (message.kind, message.key), time.monotonic()))
        return wire.Ok()

    async def _await(self, message: wire.Await, call: Call) -> wire.Awaited:
        name = (message.kind, message.key)
        if not self.state.settled(name):
            waiters = self._waiters.setdefault(name, _Waiters())
            waiters.count += 1
            try:
                async with asyncio.timeout(message.timeout_s):
                    await waiters.event.wait()
            except TimeoutError:
                return wire.Awaited(())
            finally:
                waiters.count -= 1
                if not waiters.count and self._waiters.get(name) is waiters:
                    del self._waiters[name]
        return wire.Awaited(self.state.holders(name))

    async def _share_books(self, message: wire.ShareBooks, call: Call) -> wire.SharedBooks:
        return self.guard_books.share(message)

    async def _status(self, message: wire.Status, call: Call) -> wire.StatusReply:
        status = {**self.state.stats(), "waited_for": len(self._waiters), "guard": self.guard_books.stats()}
        return wire.StatusReply(status)
