"""Streams over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from rpc_peer import Serve

from vlcache_dist import wire
from vlcache_dist.errors import DeadlineExceeded, EngineError, ProtocolError, StoreFull
from vlcache_dist.rpc import Call, RpcClient

Items = AsyncIterator[wire.MediaReply]


async def ok(message: wire.Message, call: Call) -> wire.Ok:
    return wire.Ok()


class Counting:
    """Streams 0, 1, 2, ... for ever, and says what became of it."""

    def __init__(self) -> None:
        self.sent = 0
        self.closed = asyncio.Event()

    async def forever(self, message: wire.Status, call: Call) -> Items:
        try:
            while True:
                yield wire.MediaReply(self.sent)
                self.sent += 1
                await asyncio.sleep(0.001)
        finally:
            await asyncio.sleep(0)
            self.closed.set()


async def test_items_arrive_in_order_and_the_stream_ends(serve: Serve, client: RpcClient) -> None:
    async def count(message: wire.Status, call: Call) -> Items:
        for i in range(5000):
            yield wire.MediaReply(i)

    server = await serve({wire.Status: count})
    async with client.stream(server.address, wire.Status(), timeout_s=20) as items:
        assert [item async for item in items] == [wire.MediaReply(i) for i in range(5000)]


async def test_an_empty_stream_ends(serve: Serve, client: RpcClient) -> None:
    async def nothing(message: wire.Status, call: Call) -> Items:
        for item in ():
            yield item

    server = await serve({wire.Status: nothing})
    async with client.stream(server.address, wire.Status(), timeout_s=20) as items:
        assert [item async for item in items] == []


@pytest.mark.parametrize(("error", "seen"), [(StoreFull("full"), StoreFull), (RuntimeError("oh"), EngineError)])
async def test_an_error_comes_behind_the_items_before_it(
    serve: Serve, client: RpcClient, error: Exception, seen: type[Exception]
) -> None:
    async def break_off(message: wire.Status, call: Call) -> Items:
        yield wire.MediaReply(0)
        yield wire.MediaReply(1)
        raise error

    server = await serve({wire.Status: break_off})
    received = []
    async with client.stream(server.address, wire.Status(), timeout_s=20) as items:
        with pytest.raises(seen):
            async for item in items:
                received.append(item)
    assert received == [wire.MediaReply(0), wire.MediaReply(1)]


async def test_leaving_early_closes_the_handler(serve: Serve, client: RpcClient) -> None:
    counting = Counting()
    server = await serve({wire.Status: counting.forever})
    async with client.stream(server.address, wire.Status(), timeout_s=60) as items:
        async for item in items:
            if item == wire.MediaReply(5):
                break
    await asyncio.wait_for(counting.closed.wait(), 2)


async def test_an_error_of_the_reader_closes_the_handler(serve: Serve, client: RpcClient) -> None:
    counting = Counting()
    server = await serve({wire.Status: counting.forever})
    with pytest.raises(ZeroDivisionError):
        async with client.stream(server.address, wire.Status(), timeout_s=60) as items:
            async for _ in items:
                raise ZeroDivisionError
    await asyncio.wait_for(counting.closed.wait(), 2)


async def test_a_cancelled_reader_closes_the_handler(serve: Serve, client: RpcClient) -> None:
    counting, reading = Counting(), asyncio.Event()
    server = await serve({wire.Status: counting.forever})

    async def read() -> None:
        async with client.stream(server.address, wire.Status(), timeout_s=60) as items:
            async for _ in items:
                reading.set()

    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(counting.closed.wait(), 2)


async def test_a_generator_around_a_stream_closes_the_handler_when_it_is_closed(
    serve: Serve, client: RpcClient
) -> None:
    """This is how the ingress reads: through generators, which a client that goes away closes from another task."""
    counting = Counting()
    server = await serve({wire.Status: counting.forever})

    async def pieces() -> AsyncIterator[wire.Message]:
        async with client.stream(server.address, wire.Status(), timeout_s=60) as items:
            async for item in items:
                yield item

    generator = pieces()
    assert await anext(generator) == wire.MediaReply(0)
    await asyncio.create_task(generator.aclose())  # type: ignore[attr-defined]
    await asyncio.wait_for(counting.closed.wait(), 2)


async def test_the_deadline_of_a_stream_is_kept_while_items_flow(serve: Serve, client: RpcClient) -> None:
    counting = Counting()
    server = await serve({wire.Status: counting.forever})
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        async with client.stream(server.address, wire.Status(), timeout_s=0.4) as items:
            async for _ in items:
                pass
    assert 0.35 < time.monotonic() - start < 10
    await asyncio.wait_for(counting.closed.wait(), 2)


async def test_a_deadline_that_passes_while_the_reader_is_elsewhere_is_a_deadline(
    serve: Serve, client: RpcClient
) -> None:
    """It must reach the reader as an error of its iteration, never as the cancellation of what it is doing then."""
    counting = Counting()
    server = await serve({wire.Status: counting.forever})

    async def pieces() -> AsyncIterator[wire.Message]:
        async with client.stream(server.address, wire.Status(), timeout_s=0.2) as items:
            async for item in items:
                yield item

    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        async for _ in pieces():
            await asyncio.sleep(0.5)
    assert time.monotonic() - start < 10, "a slow reader worked off first what had come before"


async def test_a_slow_reader_slows_nobody_but_itself(serve: Serve, client: RpcClient) -> None:
    """2 MB wait for a reader that does not read: calls beside it are answered, and nothing is lost or reordered."""
    produced = asyncio.Event()

    async def pour(message: wire.Status, call: Call) -> AsyncIterator[wire.StatusReply]:
        for i in range(2000):
            yield wire.StatusReply({"i": i, "filling": "x" * 1000})
        produced.set()

    server = await serve({wire.Status: pour, wire.Drain: ok})
    async with client.stream(server.address, wire.Status(), timeout_s=30) as items:
        received = [await anext(items)]
        for _ in range(20):
            start = time.monotonic()
            await client.call(server.address, wire.Drain(), timeout_s=5)
            assert time.monotonic() - start < 4
        received += [item async for item in items]
    assert [item.status["i"] for item in received] == list(range(2000))  # type: ignore[attr-defined]
    assert produced.is_set()


async def test_a_stream_is_no_answer_to_a_unary_call(serve: Serve, client: RpcClient) -> None:
    counting = Counting()
    server = await serve({wire.Status: counting.forever})
    with pytest.raises(ProtocolError, match="a stream"):
        await client.call(server.address, wire.Status(), timeout_s=20)
    await asyncio.wait_for(counting.closed.wait(), 2)
