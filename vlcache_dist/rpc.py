"""Calls between processes: ZeroMQ ROUTER and DEALER sockets under asyncio, MessagePack envelopes, typed messages.

::

    client DEALER                                server ROUTER
      CALL   id, time left, message, files  ──>    a task runs the handler
             <── ITEM* (streams) ── END (unary: the reply) or ERROR (code, message)
      CANCEL id                             ──>    the task is cancelled
      PING  (while calls are open)          ──>    PONG; a silent client's calls are cancelled

Either side notices within ``peer_timeout_s`` that the other has died or frozen: the client's calls fail with WorkerLost,
the server's handlers are cancelled. Every call has a deadline, which both sides keep. One event loop owns a server or a
client. Sockets are unbounded: what is in flight is bounded by the calls that handlers admit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import logging
import operator
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from vlcache_dist.errors import DeadlineExceeded, EngineError, ProtocolError, VLCacheError, WorkerLost, from_code
from vlcache_dist.wire import WIRE_VERSION, Message

log = logging.getLogger(__name__)

PING_EVERY_S = 0.5
PEER_TIMEOUT_S = 2.0
CALL, CANCEL, PING, ITEM, END, ERROR, PONG = range(1, 8)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """The first frame of everything. ``time_s``: seconds the caller still waits (CALL only)."""

    version: int
    kind: int
    call: int
    time_s: float = 0.0


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """The body of ERROR."""

    code: str
    message: str


_encode = msgspec.msgpack.Encoder().encode
_envelope = msgspec.msgpack.Decoder(Envelope).decode
_fault = msgspec.msgpack.Decoder(Fault).decode
_message = msgspec.msgpack.Decoder(functools.reduce(operator.or_, Message.__subclasses__())).decode


@dataclass(slots=True)
class Call:
    """What a handler may know of its call. ``peer`` names the connection, ``deadline`` is on the loop's clock."""

    peer: bytes
    deadline: float
    attachments: list[bytes]


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply with binary payloads beside it."""

    message: Message
    attachments: Sequence[bytes] = ()


Handler = Callable[[Any, Call], Awaitable[Message | Reply] | AsyncIterator[Message | Reply]]


class RpcServer:
    """Answers calls with the handlers given to ``handle``; one per message type.

    A handler is ``async def (message, call) -> Message | Reply``, or an async generator of them for a stream. What it
    raises crosses to the caller: VLCacheErrors as they are, anything else as EngineError.
    """

    def __init__(self, host: str = "127.0.0.1", *, peer_timeout_s: float = PEER_TIMEOUT_S) -> None:
        self._host = host
        self._peer_timeout_s = peer_timeout_s
        self._handlers: dict[type[Message], Handler] = {}
        self._calls: dict[tuple[bytes, int], asyncio.Task[None]] = {}
        self._heard: dict[bytes, float] = {}
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""

    def handle(self, kind: type[Message], handler: Handler) -> None:
        if kind in self._handlers:
            raise ValueError(f"{kind.__name__} has a handler already")
        self._handlers[kind] = handler

    async def start(self) -> str:
        """Bind a free port of ``host``; returns the address."""
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        if ":" in self._host:
            socket.setsockopt(zmq.IPV6, 1)
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = socket.bind_to_random_port(f"tcp://{host}")
        self._socket = socket
        self.address = f"tcp://{host}:{port}"
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch_peers())]
        return self.address

    async def close(self) -> None:
        """Cancel every call and close the socket."""
        tasks = [*self._tasks, *self._calls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        if self._socket is not None:
            self._socket.close(0)
        self._context.term()

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            peer, *frames = await self._socket.recv_multipart()
            self._heard[peer] = asyncio.get_running_loop().time()
            try:
                self._dispatch(peer, frames)
            except ProtocolError as error:
                log.warning("a peer sent nonsense: %s", error)
            except Exception:
                log.exception("a frame could not be handled")

    def _dispatch(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            envelope = _envelope(frames[0])
        except (IndexError, msgspec.DecodeError) as error:
            raise ProtocolError(f"no envelope: {error}") from error
        if envelope.version != WIRE_VERSION:
            refusal = ProtocolError(f"wire version {envelope.version} spoken to version {WIRE_VERSION}")
            self._spawn_fault(peer, envelope.call, refusal)
        elif envelope.kind == PING:
            self._send_soon(peer, Envelope(WIRE_VERSION, PONG, 0))
        elif envelope.kind == CANCEL:
            if (task := self._calls.get((peer, envelope.call))) is not None:
                task.cancel()
        elif envelope.kind == CALL:
            if (peer, envelope.call) in self._calls:
                raise ProtocolError(f"call {envelope.call} is under way already")
            task = asyncio.create_task(self._answer(peer, envelope, frames[1:]))
            self._calls[peer, envelope.call] = task
            task.add_done_callback(lambda _: self._calls.pop((peer, envelope.call), None))
        else:
            raise ProtocolError(f"kind {envelope.kind} is nothing a client sends")

    async def _answer(self, peer: bytes, envelope: Envelope, frames: list[bytes]) -> None:
        try:
            try:
                message = _message(frames[0])
            except (IndexError, msgspec.DecodeError) as error:
                raise ProtocolError(f"not a message of this protocol: {error}") from error
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{type(message).__name__} is not answered here")
            loop = asyncio.get_running_loop()
            call = Call(peer, loop.time() + envelope.time_s, list(frames[1:]))
            async with asyncio.timeout_at(call.deadline):
                if inspect.isasyncgenfunction(inspect.unwrap(handler)):
                    async with contextlib.aclosing(handler(message, call)) as items:  # type: ignore[type-var]
                        async for item in items:
                            await self._send(peer, Envelope(WIRE_VERSION, ITEM, envelope.call), item)
                    await self._send(peer, Envelope(WIRE_VERSION, END, envelope.call))
                else:
                    reply = await handler(message, call)  # type: ignore[misc]
                    await self._send(peer, Envelope(WIRE_VERSION, END, envelope.call), reply)
        except asyncio.CancelledError:
            raise
        except VLCacheError as error:
            await self._fault(peer, envelope.call, error)
        except TimeoutError:
            await self._fault(peer, envelope.call, DeadlineExceeded(f"not done within {envelope.time_s:.2f} s"))
        except Exception as error:
            log.exception("a handler failed")
            await self._fault(peer, envelope.call, EngineError(f"{type(error).__name__}: {error}"))

    async def _watch_peers(self) -> None:
        """Cancel the calls of clients that fell silent, and forget connections without calls."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._peer_timeout_s / 4)
            silent = {p for p, heard in self._heard.items() if loop.time() - heard > self._peer_timeout_s}
            for (peer, _), task in list(self._calls.items()):
                if peer in silent:
                    task.cancel()
            for peer in silent:
                del self._heard[peer]

    async def _send(self, peer: bytes, envelope: Envelope, item: Message | Reply | None = None) -> None:
        assert self._socket is not None
        frames: list[bytes] = [peer, _encode(envelope)]
        if isinstance(item, Reply):
            frames += [_encode(item.message), *item.attachments]
        elif item is not None:
            frames.append(_encode(item))
        await self._socket.send_multipart(frames)

    def _send_soon(self, peer: bytes, envelope: Envelope) -> None:
        assert self._socket is not None
        self._socket.send_multipart([peer, _encode(envelope)])  # a future; an unbounded socket takes it at once

    async def _fault(self, peer: bytes, call: int, error: VLCacheError) -> None:
        assert self._socket is not None
        body = _encode(Fault(error.code, error.message))
        await self._socket.send_multipart([peer, _encode(Envelope(WIRE_VERSION, ERROR, call)), body])

    def _spawn_fault(self, peer: bytes, call: int, error: VLCacheError) -> None:
        task = asyncio.create_task(self._fault(peer, call, error))
        self._calls[peer, -call - 1] = task
        task.add_done_callback(lambda _: self._calls.pop((peer, -call - 1), None))


@dataclass(slots=True)
class _Connection:
    """One DEALER socket. ``open`` maps call ids to the queues their frames go to."""

    socket: zmq.asyncio.Socket
    heard: float
    open: dict[int, asyncio.Queue[tuple[int, list[bytes]] | VLCacheError]] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class RpcClient:
    """Calls servers by address; connections are made on first use and kept."""

    def __init__(self, *, ping_every_s: float = PING_EVERY_S, peer_timeout_s: float = PEER_TIMEOUT_S) -> None:
        self._context = zmq.asyncio.Context()
        self._connections: dict[str, _Connection] = {}
        self._ids = itertools.count(1)
        self._ping_every_s = ping_every_s
        self._peer_timeout_s = peer_timeout_s

    async def call(
        self, address: str, message: Message, *, timeout_s: float, attachments: Sequence[bytes] = ()
    ) -> Message:
        """The reply. Raises what the handler raised, DeadlineExceeded, or WorkerLost."""
        reply, _ = await self.call_with_attachments(address, message, timeout_s=timeout_s, attachments=attachments)
        return reply

    async def call_with_attachments(
        self, address: str, message: Message, *, timeout_s: float, attachments: Sequence[bytes] = ()
    ) -> tuple[Message, list[bytes]]:
        """As ``call``, with the binary payloads beside the reply."""
        async with self._open(address, message, timeout_s, attachments) as frames:
            async for kind, body in frames:
                if kind == END and body:
                    return _decoded(body[0]), body[1:]
                raise ProtocolError(f"{type(message).__name__} was answered with a stream")
        raise ProtocolError("the call ended without a reply")

    @asynccontextmanager
    async def stream(
        self, address: str, message: Message, *, timeout_s: float, attachments: Sequence[bytes] = ()
    ) -> AsyncIterator[AsyncGenerator[Message, None]]:
        """The replies of a streaming handler. Leaving the block before the end cancels the call over there."""
        async with self._open(address, message, timeout_s, attachments) as frames:

            async def messages() -> AsyncGenerator[Message, None]:
                async for _, body in frames:
                    if body:
                        yield _decoded(body[0])

            async with contextlib.aclosing(messages()) as items:
                yield items

    def forget(self, address: str) -> None:
        """Close the connection, e.g. to a worker that is gone; its open calls fail with WorkerLost."""
        connection = self._connections.pop(address, None)
        if connection is not None:
            self._drop(connection, WorkerLost(f"{address} was given up"))

    async def close(self) -> None:
        for address in list(self._connections):
            self.forget(address)
        self._context.term()

    @asynccontextmanager
    async def _open(
        self, address: str, message: Message, timeout_s: float, attachments: Sequence[bytes]
    ) -> AsyncIterator[AsyncGenerator[tuple[int, list[bytes]], None]]:
        connection = self._connection(address)
        call = next(self._ids)
        queue: asyncio.Queue[tuple[int, list[bytes]] | VLCacheError] = asyncio.Queue()
        if not connection.open:
            connection.heard = asyncio.get_running_loop().time()
        connection.open[call] = queue
        ended = False

        async def frames() -> AsyncGenerator[tuple[int, list[bytes]], None]:
            nonlocal ended
            while True:
                item = await queue.get()
                if isinstance(item, VLCacheError):
                    ended = True
                    raise item
                ended = item[0] == END
                yield item
                if ended:
                    return

        try:
            async with asyncio.timeout(timeout_s):
                envelope = Envelope(WIRE_VERSION, CALL, call, timeout_s)
                await connection.socket.send_multipart([_encode(envelope), _encode(message), *attachments])
                async with contextlib.aclosing(frames()) as items:
                    yield items
        except TimeoutError:
            raise DeadlineExceeded(f"{type(message).__name__} to {address}: no answer within {timeout_s:.2f} s") from None
        finally:
            connection.open.pop(call, None)
            if not ended and not connection.socket.closed:
                connection.socket.send_multipart([_encode(Envelope(WIRE_VERSION, CANCEL, call))])

    def _connection(self, address: str) -> _Connection:
        connection = self._connections.get(address)
        if connection is None:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.connect(address)
            connection = _Connection(socket, asyncio.get_running_loop().time())
            connection.tasks = [
                asyncio.create_task(self._receive(connection)),
                asyncio.create_task(self._watch(address, connection)),
            ]
            self._connections[address] = connection
        return connection

    async def _receive(self, connection: _Connection) -> None:
        while True:
            frames = await connection.socket.recv_multipart()
            connection.heard = asyncio.get_running_loop().time()
            try:
                envelope = _envelope(frames[0])
                queue = connection.open.get(envelope.call)
                if queue is None:
                    continue
                if envelope.kind == ERROR:
                    fault = _fault(frames[1])
                    queue.put_nowait(from_code(fault.code, fault.message))
                else:
                    queue.put_nowait((envelope.kind, frames[1:]))
            except (IndexError, msgspec.DecodeError) as error:
                log.warning("a server sent nonsense: %s", error)

    async def _watch(self, address: str, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._ping_every_s)
            if not connection.open:
                continue
            if loop.time() - connection.heard > self._peer_timeout_s:
                if self._connections.get(address) is connection:
                    del self._connections[address]
                self._drop(connection, WorkerLost(f"{address} has not answered for {self._peer_timeout_s:.1f} s"))
                return
            await connection.socket.send_multipart([_encode(Envelope(WIRE_VERSION, PING, 0))])

    @staticmethod
    def _drop(connection: _Connection, error: VLCacheError) -> None:
        for queue in connection.open.values():
            queue.put_nowait(error)
        current = asyncio.current_task()
        for task in connection.tasks:
            if task is not current:
                task.cancel()
        connection.socket.close(0)


def _decoded(body: bytes) -> Message:
    try:
        return _message(body)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from error
