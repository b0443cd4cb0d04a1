"""Shards and clients over real sockets: hints that never fail, whether a shard dies, hangs or is restarted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest
from directory_cases import EMBEDDING, KV, META, entry, info, key, variant

from vlcache_dist import wire
from vlcache_dist.cache_directory.client import DirectoryClient
from vlcache_dist.cache_directory.server import DirectoryServer
from vlcache_dist.rpc import RpcClient


class Shards:
    """The directory's shards; ``addresses`` is what a resolver would say now."""

    def __init__(self) -> None:
        self.servers: list[DirectoryServer] = []
        self.addresses: list[str] = []
        self.resolved = 0

    async def start(self, count: int) -> None:
        for _ in range(count):
            await self._add(len(self.servers))

    async def _add(self, number: int, port: int | None = None) -> None:
        server = DirectoryServer(heartbeat_s=0.1, expiry_s=1.0)
        self.servers[number : number + 1] = [server]
        self.addresses[number : number + 1] = [await server.start(port)]

    async def kill(self, number: int) -> None:
        await self.servers[number].close()

    async def restart(self, number: int, *, same_port: bool) -> None:
        port = int(self.addresses[number].rpartition(":")[2]) if same_port else None
        await self._add(number, port)

    async def resolve(self) -> Sequence[str]:
        self.resolved += 1
        return list(self.addresses)

    async def close(self) -> None:
        for server in self.servers:
            with contextlib.suppress(Exception):  # some were killed by their test
                await server.close()


class Site:
    """A client with its own connections; ``stock`` is its inventory."""

    def __init__(self, shards: Shards, name: str | None, incarnation: int = 1) -> None:
        self.rpc = RpcClient(ping_every_s=0.1, peer_timeout_s=0.5)
        self.stock: list[wire.Entry] = []
        self.directory = DirectoryClient(
            self.rpc,
            shards.resolve,
            info=msgspec.structs.replace(info(name, incarnation), started=0.0) if name else None,  # the client's to say
            inventory=lambda: list(self.stock),
            watch_members=True,
        )

    def put(self, *entries: wire.Entry) -> None:
        for one in entries:
            self.stock.append(one)
            self.directory.announce(one)

    async def close(self) -> None:
        await self.directory.close()
        await self.rpc.close()


@pytest.fixture
async def shards() -> AsyncIterator[Shards]:
    shards = Shards()
    await shards.start(2)
    yield shards
    await shards.close()


@pytest.fixture
async def join(shards: Shards) -> AsyncIterator[Callable[..., Any]]:
    """``await join("a", 1)``: a worker; ``await join(None)``: an ingress."""
    sites: list[Site] = []

    async def add(name: str | None, incarnation: int = 1) -> Site:
        site = Site(shards, name, incarnation)
        sites.append(site)
        await site.directory.start()
        return site

    yield add
    for site in sites:
        await site.close()


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Wait for a condition (or an awaitable one) to be true."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)


async def held(site: Site, *numbers: int) -> list[list[str]]:
    return [[h.worker_id for h in state.kv] for state in await site.directory.lookup([key(n) for n in numbers])]


MANY = range(40)  #: enough keys that each of two shards has some


async def test_what_one_announces_another_finds_on_every_shard(shards: Shards, join: Any) -> None:
    a, ingress = await join("a"), await join(None)
    a.put(*(entry(n, nbytes=n) for n in MANY))
    await until(lambda: sum(s.state.stats()["objects"] for s in shards.servers) == len(MANY))
    assert all(s.state.stats()["objects"] for s in shards.servers), "both shards have a part"
    found = await ingress.directory.lookup([key(n) for n in reversed(MANY)] + [key(999), key(0)])
    assert [state.key for state in found] == [key(n) for n in reversed(MANY)] + [key(999), key(0)]
    assert [h.nbytes for state in found[: len(MANY)] for h in state.kv] == list(reversed(MANY))
    assert found[-2] == wire.KeyState(key(999), None)
    assert found[-1].meta == META


async def test_a_retraction_is_heard(shards: Shards, join: Any) -> None:
    a, b = await join("a"), await join("b")
    a.put(entry(1), entry(2))
    await until(lambda: _eq(held(b, 1, 2), [["a#1"], ["a#1"]]))
    a.directory.retract(key(1), KV, variant(0))
    await until(lambda: _eq(held(b, 1, 2), [[], ["a#1"]]))
    await b.directory.report_stale("a#1", key(2), KV, variant(0))
    assert await held(b, 2) == [[]]


async def test_ten_at_once_produce_once(shards: Shards, join: Any) -> None:
    sites = [await join(f"w{n}") for n in range(10)]
    computed: list[int] = []

    async def need(number: int, site: Site) -> int:
        while True:
            reply = await site.directory.claim(KV, key(7), 20.0)
            if reply.granted:
                computed.append(number)
                await asyncio.sleep(0.1)
                site.put(entry(7, of=number))
                return number
            if reply.holders:
                return int.from_bytes(reply.holders[0].variant, "big")
            await site.directory.wait_for(KV, key(7), 10.0)

    got = await asyncio.wait_for(asyncio.gather(*(need(n, s) for n, s in enumerate(sites))), 10)
    assert len(computed) == 1
    assert set(got) == set(computed)


async def test_those_who_wait_are_woken_when_the_producer_gives_up_or_dies(shards: Shards, join: Any) -> None:
    a, b = await join("a"), await join("b")
    for number, end in ((1, "gives up"), (2, "dies")):
        assert (await a.directory.claim(KV, key(number), 60.0)).granted
        assert (await b.directory.claim(KV, key(number), 60.0)).producer == "a#1"
        waiting = asyncio.create_task(b.directory.wait_for(KV, key(number), 30.0))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        if end == "gives up":
            a.directory.unclaim(KV, key(number))
        else:
            for task in a.directory._tasks:
                task.cancel()  # no more heartbeats
        assert await asyncio.wait_for(waiting, 4) == ()
        assert (await b.directory.claim(KV, key(number), 60.0)).granted


def claims(shards: Shards) -> dict[Any, Any]:
    return {name: claim for server in shards.servers for name, claim in server.state._claims.items()}


async def test_a_slow_producer_keeps_its_claim(shards: Shards, join: Any) -> None:
    a, b = await join("a"), await join("b")
    assert (await a.directory.claim(KV, key(1), 1.0)).granted
    until_then = claims(shards)[KV, key(1)].until
    await until(lambda: (KV, key(1)) in claims(shards) and claims(shards)[KV, key(1)].until > until_then + 1.0)
    assert (await b.directory.claim(KV, key(1), 1.0)).producer == "a#1"
    a.directory.unclaim(KV, key(1))
    await until(lambda: not claims(shards))
    await asyncio.sleep(0.8)  # longer than until a renewal was due
    assert not claims(shards)


async def test_a_restarted_shard_hears_of_claims_again(shards: Shards, join: Any) -> None:
    a = await join("a")
    for number in MANY:
        assert (await a.directory.claim(KV, key(number), 60.0)).granted
    for number in (0, 1):
        await shards.kill(number)
        await shards.restart(number, same_port=True)
    await until(lambda: len(claims(shards)) == len(MANY))


async def test_a_claim_that_ends_while_it_is_renewed_is_given_back(
    shards: Shards, join: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await join("a")
    assert (await a.directory.claim(KV, key(1), 4.0)).granted
    ask, renewed = a.directory._ask, 0

    async def late(shard: Any, message: wire.Message, *args: Any, **options: Any) -> wire.Message | None:
        nonlocal renewed
        if isinstance(message, wire.Claim):
            renewed += 1
            a.directory.unclaim(KV, key(1))
            await until(lambda: not claims(shards))
        return await ask(shard, message, *args, **options)

    monkeypatch.setattr(a.directory, "_ask", late)
    await until(lambda: renewed)
    await asyncio.sleep(0.1)
    await until(lambda: not claims(shards) and not any(s.unclaimed or s.claimed for s in a.directory._shards), 1.5)


async def test_waiting_ends_with_its_time_and_leaves_nothing_behind(shards: Shards, join: Any) -> None:
    a, b = await join("a"), await join("b")
    await a.directory.claim(EMBEDDING, key(1), 60.0)
    start = time.monotonic()
    assert await b.directory.wait_for(EMBEDDING, key(1), 0.3) == ()
    assert 0.25 < time.monotonic() - start < 10
    gone = asyncio.create_task(b.directory.wait_for(EMBEDDING, key(1), 30.0))
    await asyncio.sleep(0.1)
    gone.cancel()
    await until(lambda: not any(server._waiters for server in shards.servers))


@pytest.mark.parametrize("same_port", [True, False])
async def test_a_restarted_shard_is_told_everything_again(shards: Shards, join: Any, same_port: bool) -> None:
    a, b = await join("a"), await join("b")
    a.put(*(entry(n) for n in MANY))
    b.put(entry(0, of=1))
    await until(lambda: sum(s.state.stats()["objects"] for s in shards.servers) == len(MANY) + 1)
    for number in (0, 1):
        await shards.kill(number)
        await shards.restart(number, same_port=same_port)
    a.put(entry(100))  # in the middle of it
    expected = [["a#1", "b#1"], *[["a#1"]] * (len(MANY) - 1), ["a#1"]]

    async def complete() -> bool:
        return [sorted(h) for h in await held(b, *MANY, 100)] == expected

    await until(complete)
    for server in shards.servers:
        server.state.validate()
        assert {m.info.name for m in server.state.members(None, time.monotonic())} == {"a", "b"}


async def test_without_its_shard_a_request_goes_on_at_once(shards: Shards, join: Any) -> None:
    a = await join("a")
    for number in (0, 1):
        await shards.kill(number)
    await a.directory.lookup([key(n) for n in MANY])  # the one that finds out
    start = time.monotonic()
    assert await held(a, *MANY) == [[] for _ in MANY]
    for n in range(4):
        assert (await a.directory.claim(KV, key(n), 10.0)).granted
        assert await a.directory.wait_for(KV, key(n), 10.0) == ()
        a.directory.unclaim(KV, key(n))
    assert time.monotonic() - start < 1.9
    assert [m.info.name for m in a.directory.members()] == ["a"], "the last that was known"


async def test_a_shard_that_stops_answering_costs_one_timeout_and_the_other_goes_on(shards: Shards, join: Any) -> None:
    """Its process lives and answers pings: only calls tell."""

    async def never(message: Any, call: Any) -> wire.Ok:
        await asyncio.Event().wait()
        return wire.Ok()

    a, b = await join("a"), await join("b")
    a.put(*(entry(n) for n in MANY))
    await until(lambda: sum(s.state.stats()["objects"] for s in shards.servers) == len(MANY))
    healthy = [n for n in MANY if b.directory._shard(key(n)).number == 1]
    rpc = shards.servers[0].rpc
    answering = dict(rpc._handlers)
    rpc._handlers = dict.fromkeys(answering, (never, False))
    start = time.monotonic()
    found = await held(b, *MANY)
    assert time.monotonic() - start < 10
    assert [n for n, holders in zip(MANY, found, strict=True) if holders] == healthy
    start = time.monotonic()
    await held(b, *MANY)
    assert time.monotonic() - start < 1.9, "requests do not ask it again"
    rpc._handlers = answering
    await until(lambda: _eq(held(b, *MANY), [["a#1"]] * len(MANY)))


async def test_members_survive_the_restart_of_every_shard(shards: Shards, join: Any) -> None:
    await join("a")
    await join("b")
    ingress = await join(None)
    await until(lambda: [m.info.name for m in ingress.directory.members()] == ["a", "b"])
    for number in (0, 1):
        await shards.kill(number)
        await shards.restart(number, same_port=False)
    for _ in range(40):
        assert [m.info.name for m in ingress.directory.members()] == ["a", "b"], (
            "an ingress without workers answers 503"
        )
        await asyncio.sleep(0.02)


async def test_who_leaves_is_gone_at_once(shards: Shards, join: Any) -> None:
    a, ingress = await join("a"), await join(None)
    a.put(entry(1))
    await until(lambda: _eq(held(ingress, 1), [["a#1"]]))
    await a.close()
    assert await held(ingress, 1) == [[]]
    await until(lambda: not ingress.directory.members())
    a.directory._tasks = []


async def test_of_two_workers_of_one_name_the_later_one_stays(shards: Shards, join: Any) -> None:
    old = await join("a", 1)
    old.put(*(entry(n) for n in MANY))
    new = await join("a", 2)
    new.put(*(entry(n) for n in MANY))
    ingress = await join(None)
    await until(lambda: _eq(held(ingress, *MANY), [["a#2"]] * len(MANY)))
    for _ in range(15):  # both go on sending heartbeats
        assert await held(ingress, *MANY) == [["a#2"]] * len(MANY)
        await asyncio.sleep(0.05)
    assert [m.info.worker_id for m in ingress.directory.members()] == ["a#2"]
    await new.close()
    await until(lambda: _eq(held(ingress, *MANY), [["a#1"]] * len(MANY)))


async def _eq(found: Any, expected: Any) -> bool:
    return bool(await found == expected)


async def test_a_reader_that_was_wrong_is_put_right(shards: Shards) -> None:
    """A false report of a stale holder lasts a few heartbeats, however often it is made, and announces nothing else."""
    worker, reader = Site(shards, "a"), Site(shards, "b")
    async with contextlib.AsyncExitStack() as stack:
        for site in (worker, reader):
            stack.push_async_callback(site.close)
            await site.directory.start()
        worker.put(*(entry(number) for number in range(6)))
        await until(lambda: sum(len(server.state._holders) for server in shards.servers) == 6)
        for number in (1, 4, 1):
            await reader.directory.report_stale("a#1", key(number), KV, variant(0))
            (state,) = await reader.directory.lookup([key(number)])
            assert not state.kv
            await until(lambda: sum(len(server.state._holders) for server in shards.servers) == 6)
        for server in shards.servers:
            server.state.validate()


async def test_what_only_the_directory_believes_is_not_announced_for_ever(shards: Shards) -> None:
    worker = Site(shards, "a")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(worker.close)
        await worker.directory.start()
        worker.put(entry(1), entry(2))
        await until(lambda: sum(len(server.state._holders) for server in shards.servers) == 2)
        worker.stock.remove(entry(2))  # and nobody is told
        heard: list[wire.Announce] = []
        for server in shards.servers:
            said = server.state.announce

            def announce(message: wire.Announce, now: float, said: Any = said) -> Any:
                heard.append(message)
                return said(message, now)

            server.state.announce = announce  # type: ignore[method-assign]
        await asyncio.sleep(1.5)
        assert len(heard) <= 1
