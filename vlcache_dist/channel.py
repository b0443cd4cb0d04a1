"""A ZeroMQ socket on an asyncio event loop: frames come in by callback, frames go out at once.

pyzmq's own asyncio sockets make a future and a task for every message, which costs more than the message. Sockets are
unbounded here (``rpc`` says what bounds them instead), so that sending never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

FRAMES_PER_TURN = 256  #: messages taken in before the loop's other work gets its turn


class Channel:
    """Owns ``socket`` until ``close``; made and used inside one running event loop."""

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._turn: asyncio.Handle | None = None
        self._loop.add_reader(self._fd, self._drain)
        self._look()  # an edge that came before now will not come again

    @property
    def closed(self) -> bool:
        return bool(self._socket.closed)

    def send(self, frames: Sequence[bytes]) -> None:
        """Raises zmq.ZMQError: EHOSTUNREACH from a ROUTER whose peer is gone."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        finally:
            self._look()

    def close(self) -> None:
        """Drop what was not sent. Idempotent."""
        if self.closed:
            return
        if self._turn is not None:
            self._turn.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._socket.close(0)

    def _look(self) -> None:
        """The descriptor signals edges, and any use of the socket may swallow one: ask the socket itself."""
        if self._turn is None and not self.closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._turn = self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._turn = None
        for _ in range(FRAMES_PER_TURN):
            if self.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(frames)
        self._look()


def unbounded(context: zmq.Context[zmq.Socket[bytes]], kind: int, *, ipv6: bool = False) -> zmq.Socket[bytes]:
    """A socket without high-water marks that does not linger."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.IPV6, int(ipv6))
    return socket
