"""Unary calls over real sockets."""

from __future__ import annotations

import asyncio
import random
import statistics
import time

import pytest
from rpc_peer import Serve

from vlcache_dist import errors, wire
from vlcache_dist.errors import DeadlineExceeded, EngineError, ObjectGone, PromptTooLong, ProtocolError, WorkerLost
from vlcache_dist.rpc import Call, Reply, RpcClient


async def ok(message: wire.Message, call: Call) -> wire.Ok:
    return wire.Ok()


async def test_a_reply_has_the_type_that_the_protocol_says(serve: Serve, client: RpcClient) -> None:
    async def status(message: wire.Status, call: Call) -> wire.StatusReply:
        return wire.StatusReply({"is": "up"})

    server = await serve({wire.Status: status})
    assert await client.call(server.address, wire.Status(), timeout_s=5) == wire.StatusReply({"is": "up"})


async def test_another_reply_than_the_protocol_says_is_refused(serve: Serve, client: RpcClient) -> None:
    server = await serve({wire.Status: ok})
    with pytest.raises(ProtocolError, match="Status was answered with Ok"):
        await client.call(server.address, wire.Status(), timeout_s=5)


async def test_attachments_travel_both_ways_unchanged(serve: Serve, client: RpcClient) -> None:
    async def mirror(message: wire.GetMedia, call: Call) -> Reply:
        return Reply(wire.MediaReply(len(call.attachments)), call.attachments[::-1])

    server = await serve({wire.GetMedia: mirror})
    sent = [b"", b"\x00" * 17, random.Random(1).randbytes(4 << 20)]
    reply, received = await client.call_with_attachments(
        server.address, wire.GetMedia("r", 0), timeout_s=10, attachments=sent
    )
    assert reply == wire.MediaReply(3)
    assert received == sent[::-1]


async def test_a_handler_knows_its_deadline_and_its_peer(serve: Serve, client: RpcClient) -> None:
    seen: list[tuple[float, bytes]] = []

    async def note(message: wire.Drain, call: Call) -> wire.Ok:
        seen.append((call.deadline - asyncio.get_running_loop().time(), call.peer))
        return wire.Ok()

    server = await serve({wire.Drain: note})
    other = RpcClient()
    try:
        await client.call(server.address, wire.Drain(), timeout_s=7)
        await client.call(server.address, wire.Drain(), timeout_s=3)
        await other.call(server.address, wire.Drain(), timeout_s=3)
    finally:
        await other.close()
    (first, peer), (second, again), (_, stranger) = seen
    assert 6 < first <= 7
    assert 2 < second <= 3
    assert peer == again != stranger


@pytest.mark.parametrize("error", [PromptTooLong("9 tokens, 8 fit"), ObjectGone("evicted"), WorkerLost("gone")])
async def test_errors_cross_as_they_are(serve: Serve, client: RpcClient, error: errors.VLCacheError) -> None:
    async def fail(message: wire.Drain, call: Call) -> wire.Ok:
        raise error

    server = await serve({wire.Drain: fail})
    with pytest.raises(type(error)) as raised:
        await client.call(server.address, wire.Drain(), timeout_s=5)
    assert type(raised.value) is type(error)
    assert raised.value.message == error.message


@pytest.mark.parametrize("raised", [KeyError("key"), TimeoutError("its own"), asyncio.CancelledError()])
async def test_what_a_handler_did_not_mean_to_raise_is_an_engine_error(
    serve: Serve, client: RpcClient, raised: BaseException
) -> None:
    async def fail(message: wire.Drain, call: Call) -> wire.Ok:
        raise raised

    server = await serve({wire.Drain: fail, wire.Release: ok})
    start = time.monotonic()
    with pytest.raises(EngineError) as error:
        await client.call(server.address, wire.Drain(), timeout_s=20)
    assert time.monotonic() - start < 5, "the caller waited for its deadline"
    if isinstance(raised, Exception):
        assert type(raised).__name__ in error.value.message


async def test_a_reply_that_cannot_be_encoded_is_an_engine_error(serve: Serve, client: RpcClient) -> None:
    async def status(message: wire.Status, call: Call) -> wire.StatusReply:
        return wire.StatusReply({"no": object()})

    server = await serve({wire.Status: status})
    with pytest.raises(EngineError):
        await client.call(server.address, wire.Status(), timeout_s=20)


async def test_a_message_that_nobody_handles_is_a_protocol_error(serve: Serve, client: RpcClient) -> None:
    server = await serve({wire.Drain: ok})
    with pytest.raises(ProtocolError, match="Status is not answered here"):
        await client.call(server.address, wire.Status(), timeout_s=20)
    assert await client.call(server.address, wire.Drain(), timeout_s=5) == wire.Ok()


async def test_a_message_has_one_handler(serve: Serve) -> None:
    server = await serve({wire.Drain: ok})
    with pytest.raises(ValueError, match="Drain has a handler already"):
        server.handle(wire.Drain, ok)


async def test_both_sides_keep_the_deadline(serve: Serve, client: RpcClient) -> None:
    ended = asyncio.Event()

    async def forever(message: wire.Drain, call: Call) -> wire.Ok:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return wire.Ok()

    server = await serve({wire.Drain: forever})
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.call(server.address, wire.Drain(), timeout_s=0.3)
    assert 0.25 < time.monotonic() - start < 10
    await asyncio.wait_for(ended.wait(), 2)


async def test_a_cancelled_call_cancels_its_handler_and_nobody_elses(serve: Serve, client: RpcClient) -> None:
    started, ended, go = asyncio.Semaphore(0), asyncio.Semaphore(0), asyncio.Event()
    cancelled: list[str] = []

    async def wait(message: wire.ReleaseHandoff, call: Call) -> wire.Ok:
        started.release()
        try:
            await go.wait()
        except asyncio.CancelledError:
            cancelled.append(message.ticket)
            ended.release()
            raise
        return wire.Ok()

    server = await serve({wire.ReleaseHandoff: wait})
    calls = {
        name: asyncio.create_task(client.call(server.address, wire.ReleaseHandoff(name), timeout_s=20))
        for name in ("a", "b")
    }
    for _ in calls:
        await started.acquire()
    calls["a"].cancel()
    await asyncio.wait_for(ended.acquire(), 2)
    go.set()
    assert await calls["b"] == wire.Ok()
    assert cancelled == ["a"]


async def test_the_clean_up_of_a_cancelled_handler_may_await(serve: Serve, client: RpcClient) -> None:
    started, clean = asyncio.Event(), asyncio.Event()

    async def handler(message: wire.Drain, call: Call) -> wire.Ok:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.3)  # a deadline and a silent client fall into this
            clean.set()
        return wire.Ok()

    server = await serve({wire.Drain: handler}, peer_timeout_s=0.2)
    task = asyncio.create_task(client.call(server.address, wire.Drain(), timeout_s=0.4))
    await started.wait()
    task.cancel()
    await asyncio.wait_for(clean.wait(), 3)


async def test_a_thousand_calls_at_once_each_get_their_own_reply(serve: Serve, client: RpcClient) -> None:
    order = random.Random(2)

    async def media(message: wire.GetMedia, call: Call) -> Reply:
        await asyncio.sleep(order.random() * 0.05)
        return Reply(wire.MediaReply(message.index), [str(message.index).encode()])

    server = await serve({wire.GetMedia: media})
    replies = await asyncio.gather(
        *(client.call_with_attachments(server.address, wire.GetMedia("r", i), timeout_s=30) for i in range(1000))
    )
    assert [(reply.frames, files) for reply, files in replies] == [(i, [str(i).encode()]) for i in range(1000)]  # type: ignore[attr-defined]


async def test_a_call_costs_a_fraction_of_a_millisecond(serve: Serve, client: RpcClient) -> None:
    server = await serve({wire.Drain: ok})
    taken = []
    for _ in range(300):
        start = time.perf_counter()
        await client.call(server.address, wire.Drain(), timeout_s=5)
        taken.append(time.perf_counter() - start)
    assert statistics.median(taken) < 0.002, "ten times what it takes on an idle machine"


async def test_ipv6(serve: Serve, client: RpcClient) -> None:
    try:
        server = await serve({wire.Drain: ok}, host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    assert server.address.startswith("tcp://[::1]:")
    assert await client.call(server.address, wire.Drain(), timeout_s=5) == wire.Ok()
