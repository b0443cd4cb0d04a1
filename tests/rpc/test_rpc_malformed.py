"""Peers that send what the protocol does not allow: refused where they can be told, and the others never notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rpc_peer import Serve

from vlcache_dist import wire
from vlcache_dist.errors import ProtocolError, WorkerLost
from vlcache_dist.rpc import CALL, CANCEL, END, ERROR, PING, PONG, Call, RpcClient, RpcServer

encode = msgspec.msgpack.encode
decode = msgspec.msgpack.decode
VERSION = wire.WIRE_VERSION


async def ok(message: wire.Message, call: Call) -> wire.Ok:
    return wire.Ok()


@pytest.fixture
async def raw() -> AsyncIterator[Any]:
    """A bare DEALER."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    yield socket
    socket.close(0)
    context.term()


async def receive(socket: Any) -> list[Any]:
    return [decode(frame) for frame in await asyncio.wait_for(socket.recv_multipart(), 5)]


def envelope(kind: int, call: int, time_s: float = 5.0, version: int = VERSION) -> bytes:
    return encode((version, kind, call, time_s))


async def test_another_wire_version_is_refused_by_name(serve: Serve, raw: Any) -> None:
    server = await serve({wire.Drain: ok})
    raw.connect(server.address)
    await raw.send_multipart([envelope(CALL, 7, version=99), encode(wire.Drain())])
    (_, kind, call, *_), (code, why) = await receive(raw)
    assert (kind, call, code) == (ERROR, 7, "ProtocolError")
    assert "version 99" in why


@pytest.mark.parametrize(
    "body",
    [
        [],
        [b""],
        [b"\xc1"],
        [encode({"type": "NoSuchMessage"})],
        [encode({"type": "Lookup"})],
        [encode({"type": "Lookup", "keys": "not bytes"})],
        [encode({"type": "Drain", "extra": 1})],
        [encode(17)],
    ],
    ids=["none", "empty", "garbage", "unknown", "field missing", "field of another type", "field too many", "number"],
)
async def test_what_is_no_message_is_refused(serve: Serve, raw: Any, body: list[bytes]) -> None:
    server = await serve({wire.Drain: ok, wire.Lookup: ok})
    raw.connect(server.address)
    await raw.send_multipart([envelope(CALL, 3), *body])
    (_, kind, call, *_), (code, _) = await receive(raw)
    assert (kind, call, code) == (ERROR, 3, "ProtocolError")


NONSENSE = [
    [b""],
    [b"\xc1"],
    [b"not msgpack at all"],
    [encode("text")],
    [encode([VERSION])],
    [encode([VERSION, "kind", 1, 0.0])],
    [encode([VERSION, 99, 1, 0.0])],
    [envelope(PING, 0)],
    [envelope(PING, 0), b"\xc1"],
    [envelope(CANCEL, 12345)],
    [envelope(PONG, 0), encode([1])],
    [envelope(END, 1)],
    [envelope(CALL, 2**70 % 2**63), b"\xc1"],
]


@pytest.mark.parametrize("frames", NONSENSE, ids=range(len(NONSENSE)))
async def test_nonsense_hurts_nobody(serve: Serve, client: RpcClient, raw: Any, frames: list[bytes]) -> None:
    server = await serve({wire.Drain: ok})
    raw.connect(server.address)
    for _ in range(3):
        await raw.send_multipart(frames)
    assert await client.call(server.address, wire.Drain(), timeout_s=5) == wire.Ok()
    await raw.send_multipart([envelope(CALL, 500), encode(wire.Drain())])
    while (await receive(raw))[0][2] != 500:
        pass  # the same peer is answered, too; refusals of the nonsense may come first


@pytest.mark.parametrize("time_s", [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e300])
async def test_a_time_that_is_none_ends_the_call_or_is_kept(serve: Serve, raw: Any, time_s: float) -> None:
    server = await serve({wire.Drain: ok})
    raw.connect(server.address)
    await raw.send_multipart([envelope(CALL, 1, time_s), encode(wire.Drain())])
    assert (await receive(raw))[0][2] == 1
    await raw.send_multipart([envelope(CALL, 2), encode(wire.Drain())])
    assert (await receive(raw))[0][1:3] == [END, 2]


async def test_a_call_id_that_is_under_way_does_not_disturb_its_call(serve: Serve, raw: Any) -> None:
    go, calls = asyncio.Event(), 0

    async def wait(message: wire.Drain, call: Call) -> wire.Ok:
        nonlocal calls
        calls += 1
        await go.wait()
        return wire.Ok()

    server = await serve({wire.Drain: wait})
    raw.connect(server.address)
    for _ in range(2):
        await raw.send_multipart([envelope(CALL, 1), encode(wire.Drain())])
    await raw.send_multipart([envelope(PING, 0), encode([1, 8, 9])])
    assert await receive(raw) == [[VERSION, PONG, 0, 0.0], [8, 9]], "those that are not known"
    go.set()
    assert (await receive(raw))[0][1:3] == [END, 1]
    assert calls == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.tuples(st.sampled_from([0, VERSION]), st.integers(-1, 9), st.integers(0, 3), st.floats()).map(
                    encode
                ),
                st.sampled_from([encode(wire.Drain()), encode(wire.Lookup(())), encode([1, 2])]),
            ),
            min_size=1,
            max_size=4,
        ),
        max_size=12,
    )
)
def test_whatever_comes_the_server_answers_the_next_call(messages: list[list[bytes]]) -> None:
    async def run() -> None:
        server, client, context = RpcServer(), RpcClient(), zmq.asyncio.Context()
        server.handle(wire.Drain, ok)
        socket = context.socket(zmq.DEALER)
        try:
            socket.connect(await server.start())
            for message in messages:
                await socket.send_multipart(message)
            assert await client.call(server.address, wire.Drain(), timeout_s=5) == wire.Ok()
        finally:
            socket.close(0)
            context.term()
            await client.close()
            await server.close()

    asyncio.run(run())


class FakeServer:
    """A bare ROUTER that answers each call with given frames behind the peer's identity."""

    def __init__(self, *replies: list[bytes]) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._replies = replies
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            peer, first, *body = await self._socket.recv_multipart()
            _, kind, call, _ = decode(first)
            if kind == PING:
                await self._socket.send_multipart([peer, envelope(PONG, 0), *body])  # knows none of the calls
            if kind == CALL:
                for reply in self._replies:
                    frames = [frame.replace(b"CALL", bytes([call])) for frame in reply]
                    await self._socket.send_multipart([peer, *frames])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(0)
        self._context.term()


END_OF_CALL = b"\x94" + bytes([VERSION, END]) + b"CALL" + encode(0.0)


@pytest.mark.parametrize(
    "replies",
    [
        [[END_OF_CALL, b"\xc1"]],
        [[END_OF_CALL]],
        [[END_OF_CALL, encode({"type": "NoSuchMessage"})]],
    ],
    ids=["garbage", "nothing", "unknown"],
)
async def test_an_answer_that_is_no_message_is_a_protocol_error(client: RpcClient, replies: list[list[bytes]]) -> None:
    server = FakeServer(*replies)
    try:
        with pytest.raises(ProtocolError):
            await client.call(server.address, wire.Drain(), timeout_s=5)
    finally:
        await server.close()


async def test_nonsense_before_an_answer_is_passed_over(client: RpcClient) -> None:
    other_call = encode((VERSION, END, 100, 0.0))
    error = b"\x94" + bytes([VERSION, ERROR]) + b"CALL" + encode(0.0)
    server = FakeServer(
        [b"\xc1"], [b""], [other_call, encode(wire.Ok())], [error, b"\xc1"], [END_OF_CALL, encode(wire.Ok())]
    )
    try:
        assert await client.call(server.address, wire.Drain(), timeout_s=5) == wire.Ok()
    finally:
        await server.close()


async def test_a_call_that_the_server_knows_nothing_of_is_lost(client: RpcClient) -> None:
    server = FakeServer()
    try:
        start = time.monotonic()
        with pytest.raises(WorkerLost, match="knows nothing"):
            await client.call(server.address, wire.Drain(), timeout_s=30)
        assert time.monotonic() - start < 20
    finally:
        await server.close()
