"""Peers that die, freeze, restart, or leave; and a process that was itself stopped for a while."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from rpc_peer import Serve, running

from vlcache_dist import wire
from vlcache_dist.errors import VLCacheError, WorkerLost
from vlcache_dist.rpc import Call, RpcClient, RpcServer


async def ok(message: wire.Message, call: Call) -> wire.Ok:
    return wire.Ok()


class Waiting:
    """A handler that never answers; counts the calls under way."""

    def __init__(self) -> None:
        self.running = 0
        self.changed = asyncio.Condition()

    async def __call__(self, message: wire.Drain, call: Call) -> wire.Ok:
        await self._add(1)
        try:
            await asyncio.Event().wait()
        finally:
            await self._add(-1)
        return wire.Ok()

    async def _add(self, change: int) -> None:
        async with self.changed:
            self.running += change
            self.changed.notify_all()

    async def until(self, running: int, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(lambda: self.running == running)


async def lost_after(call: asyncio.Task[wire.Message]) -> float:
    """Seconds until the call fails with WorkerLost."""
    start = time.monotonic()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(call, 30)  # where nothing noticed, the call itself would take 60
    return time.monotonic() - start


async def test_a_killed_server_is_noticed_at_once(client: RpcClient) -> None:
    with running("serve") as peer:
        address = await asyncio.to_thread(peer.line)
        await client.call(address, wire.Status(), timeout_s=10)
        calls = [asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60)) for _ in range(3)]
        await asyncio.sleep(0.1)
        peer.kill()
        for call in calls:
            await lost_after(call)
        again = asyncio.create_task(client.call(address, wire.Status(), timeout_s=60))
        await lost_after(again)  # nobody listens there any more


async def test_a_frozen_server_is_noticed_by_its_silence_and_forgiven() -> None:
    client = RpcClient(ping_every_s=0.1, peer_timeout_s=0.6)
    try:
        with running("serve") as peer:
            address = await asyncio.to_thread(peer.line)
            await client.call(address, wire.Status(), timeout_s=10)
            call = asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60))
            await asyncio.sleep(0.3)
            peer.stop()
            assert await lost_after(call) > 0.3
            peer.go_on()
            assert isinstance(await client.call(address, wire.Status(), timeout_s=10), wire.StatusReply)
    finally:
        await client.close()


async def test_a_server_that_answers_nothing_else_is_alive(client: RpcClient) -> None:
    """A long call is no dead peer."""
    client = RpcClient(ping_every_s=0.05, peer_timeout_s=0.3)
    try:
        with running("serve") as peer:
            address = await asyncio.to_thread(peer.line)
            call = asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60))
            done, _ = await asyncio.wait([call], timeout=1.5)
            assert not done
            call.cancel()
    finally:
        await client.close()


async def test_the_handlers_of_a_killed_client_are_cancelled(serve: Serve) -> None:
    waiting = Waiting()
    server = await serve({wire.Drain: waiting.__call__}, peer_timeout_s=1.0)
    with running("call", server.address) as peer:
        await waiting.until(1, 60)
        peer.kill()
        await waiting.until(0, 60)


async def test_the_handlers_of_a_frozen_client_are_cancelled_and_it_is_told_when_it_wakes(serve: Serve) -> None:
    waiting = Waiting()
    server = await serve({wire.Drain: waiting.__call__}, peer_timeout_s=1.0)
    with running("call", server.address) as peer:
        assert await asyncio.to_thread(peer.line) == "calling"
        await waiting.until(1, 60)
        peer.stop()
        await waiting.until(0, 60)
        peer.go_on()
        assert await asyncio.wait_for(asyncio.to_thread(peer.line), 10) == "WorkerLost"


async def test_a_stall_of_the_own_process_is_not_taken_for_the_servers_silence() -> None:
    client = RpcClient(ping_every_s=0.1, peer_timeout_s=0.5)
    try:
        with running("serve") as peer:
            address = await asyncio.to_thread(peer.line)
            await client.call(address, wire.Status(), timeout_s=10)
            call = asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60))
            await asyncio.sleep(0.25)
            time.sleep(1.2)  # noqa: ASYNC251
            done, _ = await asyncio.wait([call], timeout=0.8)
            assert not done, call
            call.cancel()
    finally:
        await client.close()


async def test_a_pause_of_both_processes_is_not_taken_for_the_clients_silence(serve: Serve) -> None:
    """A host that was suspended: when it goes on, neither has heard of the other."""
    waiting = Waiting()
    server = await serve({wire.Drain: waiting.__call__}, peer_timeout_s=1.0)
    with running("call", server.address) as peer:
        await waiting.until(1, 60)
        await asyncio.sleep(0.6)
        peer.stop()
        time.sleep(2.5)  # noqa: ASYNC251
        peer.go_on()
        await asyncio.sleep(1.5)
        assert waiting.running == 1


async def test_a_restarted_server_does_not_leave_its_callers_waiting(client: RpcClient) -> None:
    """Same address, another process behind it: pings are answered, the call is not known there."""

    waiting, first, second = Waiting(), RpcServer(), RpcServer()
    first.handle(wire.Drain, waiting.__call__)
    second.handle(wire.Drain, ok)
    address = await first.start()
    try:
        call = asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60))
        await waiting.until(1, 60)
        await first.close()
        await second.start(int(address.rpartition(":")[2]))
        await lost_after(call)
        assert await client.call(address, wire.Drain(), timeout_s=5) == wire.Ok()
    finally:
        await second.close()


async def test_an_address_where_nobody_listens_fails_fast(client: RpcClient) -> None:
    nobody = RpcServer()
    address = await nobody.start()
    await nobody.close()
    call = asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60))
    await lost_after(call)


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://127.0.0.1:0", "tcp://127.0.0.1:99999"])
async def test_what_is_no_address_is_lost(client: RpcClient, address: str) -> None:
    call = asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60))
    await lost_after(call)


async def test_a_server_that_closes_tells_its_callers(client: RpcClient) -> None:
    waiting, server = Waiting(), RpcServer()
    server.handle(wire.Drain, waiting.__call__)
    address = await server.start()
    call = asyncio.create_task(client.call(address, wire.Drain(), timeout_s=60))
    await waiting.until(1, 60)
    await server.close()
    assert waiting.running == 0, "handlers have ended"
    await lost_after(call)


async def test_a_client_that_closes_ends_its_calls_and_their_handlers(serve: Serve) -> None:
    waiting = Waiting()
    server = await serve({wire.Drain: waiting.__call__})
    client = RpcClient()
    call = asyncio.create_task(client.call(server.address, wire.Drain(), timeout_s=60))
    await waiting.until(1, 60)
    await client.close()
    with pytest.raises(VLCacheError):
        await call
    with pytest.raises(WorkerLost):
        await client.call(server.address, wire.Drain(), timeout_s=5)
    await waiting.until(0, 60)


async def test_nothing_is_kept_of_clients_that_came_and_went(serve: Serve) -> None:
    server = await serve({wire.Drain: ok}, peer_timeout_s=0.4)
    for _ in range(20):
        client = RpcClient()
        await client.call(server.address, wire.Drain(), timeout_s=5)
        await client.close()
    await asyncio.sleep(1.0)
    assert not server._calls
    assert not server._heard


async def test_thousands_of_connections_that_break_leave_the_others_alone(serve: Serve, client: RpcClient) -> None:
    """All of a client's connections share one I/O thread, and a connection may break at any moment of its closing.
    (Where the order of closing was wrong, one in a thousand stopped that thread for good.)"""
    server = await serve({wire.Drain: ok})
    broken = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with contextlib.AsyncExitStack() as stack:
        doors = [await stack.enter_async_context(await asyncio.start_server(hang_up, "127.0.0.1")) for _ in range(8)]

        async def knock(port: int) -> None:
            nonlocal broken
            for _ in range(700):
                with contextlib.suppress(VLCacheError):
                    await client.call(f"tcp://127.0.0.1:{port}", wire.Drain(), timeout_s=30)
                broken += 1

        knocking = asyncio.gather(*(knock(door.sockets[0].getsockname()[1]) for door in doors))
        while not knocking.done():
            assert await client.call(server.address, wire.Drain(), timeout_s=30) == wire.Ok()
            await asyncio.sleep(0.01)
        await knocking
    assert broken == 8 * 700
