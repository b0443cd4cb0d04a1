"""Calls between processes: ZeroMQ ROUTER and DEALER sockets under asyncio, MessagePack envelopes, typed messages.

::

    client DEALER                                server ROUTER
      CALL   id, time left, message, files  ──>    a task runs the handler
             <── ITEM* (streams) ── END (unary: the reply) or ERROR (code, message)
      CANCEL id                             ──>    the task is cancelled
      PING   open ids (while there are any) ──>    PONG: those of them that are not known here

How a call ends, whatever happens to either side:

* Both keep its deadline: the caller sees DeadlineExceeded, the handler is cancelled.
* A dead server is seen by its closed connection, a frozen or unreachable one by ``peer_timeout_s`` of silence, and one
  that has lost the call (it was restarted, or had given this client up) by its PONG: the caller sees WorkerLost.
* The handlers of a client that is silent for ``peer_timeout_s``, or whose connection is found closed, are cancelled.
* A process that was itself stopped for a while does not take its own silence for that of others.

One event loop owns a server or a client. Sockets are unbounded: what is in flight is bounded by the calls that handlers
admit and by the length of their streams; a slow reader of a stream slows nobody but itself.
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

from vlcache_dist.channel import Channel, unbounded
from vlcache_dist.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    ProtocolError,
    VLCacheError,
    WorkerLost,
    from_code,
)
from vlcache_dist.wire import REPLIES, WIRE_VERSION, Message

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
_call_ids = msgspec.msgpack.Decoder(list[int]).decode
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


@dataclass(slots=True)
class _Running:
    """A call being answered. ``stopped``: why its handler was cancelled, which happens once at most, so that a
    handler's own clean-up is never interrupted."""

    task: asyncio.Task[None] | None = None
    stopped: VLCacheError | None = None

    def stop(self, why: VLCacheError) -> None:
        if self.stopped is None and self.task is not None:
            self.stopped = why
            self.task.cancel()


class RpcServer:
    """Answers calls with the handlers given to ``handle``; one per message type.

    A handler is ``async def (message, call) -> Message | Reply``, or an async generator of them for a stream. What it
    raises crosses to the caller: VLCacheErrors as they are, anything else as EngineError. It is cancelled when its
    caller goes away or its time is over, and once at most: its clean-up may await.
    """

    def __init__(self, host: str = "127.0.0.1", *, peer_timeout_s: float = PEER_TIMEOUT_S) -> None:
        self._host = host
        self._peer_timeout_s = peer_timeout_s
        self._handlers: dict[type[Message], tuple[Handler, bool]] = {}  # bool: streams
        self._calls: dict[bytes, dict[int, _Running]] = {}  # by peer
        self._heard: dict[bytes, float] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel: Channel | None = None
        self._watch: asyncio.Task[None] | None = None
        self.address = ""

    def handle(self, kind: type[Message], handler: Handler) -> None:
        if kind in self._handlers:
            raise ValueError(f"{kind.__name__} has a handler already")
        self._handlers[kind] = handler, inspect.isasyncgenfunction(inspect.unwrap(handler))

    async def start(self, port: int | None = None) -> str:
        """Bind ``port`` of ``host``, or a free one; returns the address."""
        ipv6 = ":" in self._host
        host = f"[{self._host}]" if ipv6 else self._host
        socket = unbounded(self._context, zmq.ROUTER, ipv6=ipv6)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an answer to a client that is gone is an error, not dropped
        if port is None:
            port = socket.bind_to_random_port(f"tcp://{host}")
        else:
            socket.bind(f"tcp://{host}:{port}")
        self.address = f"tcp://{host}:{port}"
        self._channel = Channel(socket, self._receive)
        self._watch = asyncio.create_task(_every(self._peer_timeout_s / 4, self._check_peers))
        return self.address

    async def close(self) -> None:
        """Cancel every call, wait for the handlers' clean-up, close the socket."""
        if self._watch is not None:
            self._watch.cancel()
        running = [call for calls in self._calls.values() for call in calls.values()]
        for call in running:
            call.stop(WorkerLost(f"{self.address} is shutting down"))
        await asyncio.gather(*(call.task for call in running if call.task is not None), return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
        self._context.term()

    # -- frames -------------------------------------------------------------------------------------------------

    def _receive(self, frames: list[bytes]) -> None:
        peer, *frames = frames
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
            asked = _call_ids(frames[1]) if envelope.kind == PING else []
        except (IndexError, msgspec.DecodeError) as error:
            raise ProtocolError(f"no envelope: {error}") from error
        calls = self._calls.get(peer, {})
        if envelope.version != WIRE_VERSION:
            why = f"wire version {envelope.version} spoken to version {WIRE_VERSION}"
            self._fault(peer, envelope.call, ProtocolError(why))
        elif envelope.kind == PING:
            unknown = [call for call in asked if call not in calls]
            self._send(peer, Envelope(WIRE_VERSION, PONG, 0), _encode(unknown))
        elif envelope.kind == CANCEL:
            if (running := calls.get(envelope.call)) is not None:
                running.stop(Cancelled("the caller went away"))
        elif envelope.kind == CALL:
            if envelope.call in calls:
                raise ProtocolError(f"call {envelope.call} is under way already")
            self._start_call(peer, envelope, frames[1:])
        else:
            raise ProtocolError(f"kind {envelope.kind} is nothing a client sends")

    def _send(self, peer: bytes, envelope: Envelope, *body: bytes) -> None:
        assert self._channel is not None
        if self._channel.closed:
            return
        try:
            self._channel.send([peer, _encode(envelope), *body])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._give_up(peer)

    def _item(self, peer: bytes, kind: int, call: int, item: Message | Reply) -> None:
        reply = item if isinstance(item, Reply) else Reply(item)
        self._send(peer, Envelope(WIRE_VERSION, kind, call), _encode(reply.message), *reply.attachments)

    def _fault(self, peer: bytes, call: int, error: VLCacheError) -> None:
        self._send(peer, Envelope(WIRE_VERSION, ERROR, call), _encode(Fault(error.code, error.message)))

    # -- calls --------------------------------------------------------------------------------------------------

    def _start_call(self, peer: bytes, envelope: Envelope, frames: list[bytes]) -> None:
        running = _Running()
        self._calls.setdefault(peer, {})[envelope.call] = running
        running.task = asyncio.create_task(self._answer(peer, envelope, frames, running))
        running.task.add_done_callback(lambda _: self._ended(peer, envelope.call))

    def _ended(self, peer: bytes, call: int) -> None:
        calls = self._calls[peer]
        del calls[call]
        if not calls:
            del self._calls[peer]

    async def _answer(self, peer: bytes, envelope: Envelope, frames: list[bytes], running: _Running) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + envelope.time_s
        late = DeadlineExceeded(f"not done within {envelope.time_s:.2f} s")
        timer = loop.call_at(deadline, running.stop, late)
        try:
            try:
                message = _message(frames[0])
            except (IndexError, msgspec.DecodeError) as error:
                raise ProtocolError(f"not a message of this protocol: {error}") from error
            if type(message) not in self._handlers:
                raise ProtocolError(f"{type(message).__name__} is not answered here")
            handler, streams = self._handlers[type(message)]
            call = Call(peer, deadline, list(frames[1:]))
            if streams:
                async with contextlib.aclosing(handler(message, call)) as items:  # type: ignore[type-var]
                    async for item in items:  # type: ignore[union-attr]
                        self._item(peer, ITEM, envelope.call, item)
                self._send(peer, Envelope(WIRE_VERSION, END, envelope.call))
            else:
                reply = await handler(message, call)  # type: ignore[misc]
                self._item(peer, END, envelope.call, reply)
        except asyncio.CancelledError:
            self._fault(peer, envelope.call, running.stopped or EngineError("the handler was cancelled"))
        except VLCacheError as error:
            self._fault(peer, envelope.call, error)
        except Exception as error:
            log.exception("a handler failed")
            self._fault(peer, envelope.call, EngineError(f"{type(error).__name__}: {error}"))
        finally:
            timer.cancel()

    def _check_peers(self, now: float, late_s: float) -> None:
        """Give up clients that fell silent, and forget connections without calls."""
        for peer in self._heard:
            self._heard[peer] += late_s
        for peer in [p for p, heard in self._heard.items() if now - heard > self._peer_timeout_s]:
            self._give_up(peer)

    def _give_up(self, peer: bytes) -> None:
        self._heard.pop(peer, None)
        for running in list(self._calls.get(peer, {}).values()):
            running.stop(WorkerLost("the caller was silent for too long"))


class _Pending:
    """A call that was sent. Its frames, or its end, come in through ``deliver``."""

    def __init__(self, connection: _Connection, call: int, deadline: float, late: DeadlineExceeded) -> None:
        self._connection = connection
        self._call = call
        self._frames: asyncio.Queue[tuple[int, list[bytes]] | VLCacheError] = asyncio.Queue()
        self._ended = False  # over there as well
        self._late: DeadlineExceeded | None = None
        self._timer = asyncio.get_running_loop().call_at(deadline, self._expire, late)
        connection.open[call] = self

    def deliver(self, item: tuple[int, list[bytes]] | VLCacheError) -> None:
        self._ended = isinstance(item, VLCacheError) or item[0] == END
        self._frames.put_nowait(item)

    def _expire(self, late: DeadlineExceeded) -> None:
        if not self._ended:
            self._late = late  # a slow reader is not to work off first what came before
            self._frames.put_nowait(late)

    async def next(self) -> tuple[int, list[bytes]]:
        """(kind, body) of the next frame. Raises what ended the call."""
        item = self._late or await self._frames.get()
        if isinstance(item, VLCacheError):
            raise item
        return item

    def close(self) -> None:
        """Nobody waits any more; if the handler still runs, it is told so."""
        self._timer.cancel()
        self._connection.open.pop(self._call, None)
        if not self._ended:
            self._connection.send(Envelope(WIRE_VERSION, CANCEL, self._call))


@dataclass(slots=True)
class _Connection:
    """One DEALER socket, and the socket on which ZeroMQ tells what becomes of its TCP connection."""

    address: str
    heard: float
    socket: zmq.Socket[bytes]
    open: dict[int, _Pending] = field(default_factory=dict)
    channel: Channel | None = None
    monitor: Channel | None = None

    def send(self, envelope: Envelope, *body: bytes) -> None:
        assert self.channel is not None
        if not self.channel.closed:
            self.channel.send([_encode(envelope), *body])

    def close(self) -> None:
        assert self.channel is not None and self.monitor is not None
        # ZeroMQ's I/O thread, which serves all connections, waits for whoever reads the events: for ever, if an event
        # comes when the reader is closed already. So there are no more events first.
        self.socket.disable_monitor()
        self.monitor.close()
        self.channel.close()


class RpcClient:
    """Calls servers by address; connections are made on first use and kept."""

    def __init__(self, *, ping_every_s: float = PING_EVERY_S, peer_timeout_s: float = PEER_TIMEOUT_S) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connections: dict[str, _Connection] = {}
        self._ids = itertools.count(1)
        self._ping_every_s = ping_every_s
        self._peer_timeout_s = peer_timeout_s
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    async def call(
        self, address: str, message: Message, *, timeout_s: float, attachments: Sequence[bytes] = ()
    ) -> Message:
        """The reply. Raises what the handler raised, DeadlineExceeded, WorkerLost, or ProtocolError for a reply of
        another type than ``wire.REPLIES`` says."""
        reply, _ = await self.call_with_attachments(address, message, timeout_s=timeout_s, attachments=attachments)
        return reply

    async def call_with_attachments(
        self, address: str, message: Message, *, timeout_s: float, attachments: Sequence[bytes] = ()
    ) -> tuple[Message, list[bytes]]:
        """As ``call``, with the binary payloads beside the reply."""
        pending = self._start(address, message, timeout_s, attachments)
        try:
            kind, body = await pending.next()
        finally:
            pending.close()
        if kind != END or not body:
            raise ProtocolError(f"{type(message).__name__} was answered with a stream")
        reply = _decoded(body[0])
        if not isinstance(reply, REPLIES[type(message)]):
            raise ProtocolError(f"{type(message).__name__} was answered with {type(reply).__name__} by {address}")
        return reply, body[1:]

    @asynccontextmanager
    async def stream(
        self, address: str, message: Message, *, timeout_s: float, attachments: Sequence[bytes] = ()
    ) -> AsyncIterator[AsyncGenerator[Message, None]]:
        """The replies of a streaming handler. Leaving the block before the end cancels the call over there. Raises as
        ``call``, while the replies are iterated."""
        pending = self._start(address, message, timeout_s, attachments)

        async def messages() -> AsyncGenerator[Message, None]:
            while True:
                kind, body = await pending.next()
                if body:
                    yield _decoded(body[0])
                if kind == END:
                    return

        try:
            async with contextlib.aclosing(messages()) as items:
                yield items
        finally:
            pending.close()

    def forget(self, address: str) -> None:
        """Close the connection, e.g. to a worker that is gone; its open calls fail with WorkerLost."""
        if (connection := self._connections.get(address)) is not None:
            self._drop(connection, "was given up")

    async def close(self) -> None:
        """Open calls fail with WorkerLost."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        for connection in list(self._connections.values()):
            self._drop(connection, "is not called any more: this process is shutting down")
        self._context.term()

    # -- connections --------------------------------------------------------------------------------------------

    def _start(self, address: str, message: Message, timeout_s: float, attachments: Sequence[bytes]) -> _Pending:
        if self._closed:
            raise WorkerLost(f"{address} cannot be called: this process is shutting down")
        body = _encode(message)
        connection = self._connections.get(address) or self._connect(address)
        now = asyncio.get_running_loop().time()
        if not connection.open:
            connection.heard = now  # nothing was to be heard while nothing was asked
        late = DeadlineExceeded(f"{type(message).__name__} to {address}: no answer within {timeout_s:.2f} s")
        call = next(self._ids)
        pending = _Pending(connection, call, now + timeout_s, late)
        connection.send(Envelope(WIRE_VERSION, CALL, call, timeout_s), body, *attachments)
        return pending

    def _connect(self, address: str) -> _Connection:
        socket = unbounded(self._context, zmq.DEALER, ipv6="[" in address)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise WorkerLost(f"{address!r} is no address: {error}") from error
        connection = self._connections[address] = _Connection(address, asyncio.get_running_loop().time(), socket)
        events = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
        connection.monitor = Channel(events, lambda _: self._drop(connection, "refused or closed the connection"))
        connection.channel = Channel(socket, functools.partial(self._receive, connection))
        if self._watch is None:
            self._watch = asyncio.create_task(_every(self._ping_every_s, self._check_servers))
        return connection

    def _receive(self, connection: _Connection, frames: list[bytes]) -> None:
        connection.heard = asyncio.get_running_loop().time()
        try:
            envelope = _envelope(frames[0])
            if envelope.kind == PONG:
                for call in _call_ids(frames[1]):
                    if (pending := connection.open.get(call)) is not None:
                        pending.deliver(WorkerLost(f"{connection.address} knows nothing of the call (any more)"))
            elif (pending := connection.open.get(envelope.call)) is not None:
                if envelope.kind == ERROR:
                    fault = _fault(frames[1])
                    pending.deliver(from_code(fault.code, fault.message))
                else:
                    pending.deliver((envelope.kind, frames[1:]))
        except (IndexError, msgspec.DecodeError) as error:
            log.warning("%s sent nonsense: %s", connection.address, error)

    def _check_servers(self, now: float, late_s: float) -> None:
        for connection in list(self._connections.values()):
            if not connection.open:
                continue
            connection.heard += late_s
            if now - connection.heard > self._peer_timeout_s:
                self._drop(connection, f"has not answered for {self._peer_timeout_s:.1f} s")
            else:
                connection.send(Envelope(WIRE_VERSION, PING, 0), _encode(list(connection.open)))

    def _drop(self, connection: _Connection, why: str) -> None:
        if self._connections.get(connection.address) is not connection:
            return
        del self._connections[connection.address]
        connection.close()
        for pending in list(connection.open.values()):
            pending.deliver(WorkerLost(f"{connection.address} {why}"))


async def _every(period_s: float, work: Callable[[float, float], None]) -> None:
    """Call ``work(now, late_s)`` again and again; ``late_s``: by how much this process overslept."""
    loop = asyncio.get_running_loop()
    before = loop.time()
    while True:
        await asyncio.sleep(period_s)
        now = loop.time()
        try:
            work(now, max(0.0, now - before - period_s))
        except Exception:
            log.exception("watching peers failed")
        before = now


def _decoded(body: bytes) -> Message:
    try:
        return _message(body)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from error
