"""A connection between a leader and a follower: typed messages, each framed by its length, over one TCP socket.

A closed socket is how either side learns of the other's death, even of a killed one. The first message says the
worker's secret, and nothing else is listened to before it is right.
"""

from __future__ import annotations

import hmac
import select
import socket
import struct
import threading
import time
from typing import Any

import msgspec
import numpy as np

LENGTH = struct.Struct("<Q")
MAX_BYTES = 1 << 32
JOIN_BYTES = 1024
HELLO_S = 5.0


class LinkClosed(ConnectionError):
    """The other side is gone, or this side has closed the link."""


class Invitation(msgspec.Struct, frozen=True):
    """What a follower must know to reach its leader."""

    host: str
    port: int
    secret: str
    rank: int


class Join(msgspec.Struct, frozen=True):
    """The first message of a link. ``side``: it is the second link of the rank."""

    secret: str
    rank: int
    side: bool


class Link:
    """Any thread may send, one receives. ``messages``: the union of what may come in."""

    def __init__(self, connection: socket.socket, messages: Any) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._socket = connection
        self._decode = msgspec.msgpack.Decoder(messages, dec_hook=_to_array).decode
        self._sending = threading.Lock()
        self._buffer = bytearray(LENGTH.size)
        self._filled = 0
        self._in_body = False

    def send(self, message: Any) -> None:
        """Raises LinkClosed."""
        self.send_frame(frame(message))

    def send_frame(self, encoded: bytearray) -> None:
        """What ``frame`` made of a message. Raises LinkClosed."""
        try:
            with self._sending:
                self._socket.sendall(encoded)
        except OSError as error:
            raise LinkClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message. Raises TimeoutError (what came so far is kept), LinkClosed, or msgspec.ValidationError."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._fill(deadline)
            if self._in_body:
                body, self._buffer, self._filled, self._in_body = self._buffer, bytearray(LENGTH.size), 0, False
                return self._decode(body)
            (length,) = LENGTH.unpack(self._buffer)
            if length > MAX_BYTES:
                raise LinkClosed(f"a message of {length} bytes")
            self._buffer, self._filled, self._in_body = bytearray(length), 0, True

    def close(self) -> None:
        """Wake whoever receives. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed already, here or there
        finally:
            self._socket.close()

    def _fill(self, deadline: float | None) -> None:
        view = memoryview(self._buffer)
        while self._filled < len(self._buffer):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            try:
                count = self._receive_into(view[self._filled :], left)
            except TimeoutError:
                raise
            except (OSError, ValueError) as error:
                raise LinkClosed(str(error)) from error
            if count == 0:
                raise LinkClosed("the other side has closed the link")
            self._filled += count

    def _receive_into(self, view: memoryview, left: float | None) -> int:
        if left is not None:
            readable, _, _ = select.select([self._socket], [], [], left)
            if not readable:
                raise TimeoutError
        return self._socket.recv_into(view)


def frame(message: Any) -> bytearray:
    """A message as it travels: its length and its MessagePack, arrays as (dtype, shape, bytes)."""
    encoded = bytearray(LENGTH.size)
    msgspec.msgpack.Encoder(enc_hook=_from_array).encode_into(message, encoded, LENGTH.size)
    LENGTH.pack_into(encoded, 0, len(encoded) - LENGTH.size)
    return encoded


class Doorway:
    """Where a leader's followers come in. ``invitation(rank)`` says how."""

    def __init__(self, host: str, secret: str) -> None:
        self._server = socket.create_server((host, 0))
        self._secret = secret
        self._host = host

    def invitation(self, rank: int) -> Invitation:
        return Invitation(self._host, self._server.getsockname()[1], self._secret, rank)

    def next(self, timeout_s: float) -> tuple[Join, socket.socket] | None:
        """The next follower's connection with its Join; None if nobody came, or one who does not know the secret."""
        self._server.settimeout(timeout_s)
        try:
            connection, _ = self._server.accept()
        except TimeoutError:
            return None
        connection.settimeout(HELLO_S)
        try:
            (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
            if length > JOIN_BYTES:
                raise LinkClosed(f"a first message of {length} bytes")
            join = msgspec.msgpack.decode(_exactly(connection, length), type=Join)
        except (OSError, msgspec.DecodeError):
            connection.close()
            return None
        if not hmac.compare_digest(join.secret, self._secret):
            connection.close()
            return None
        return join, connection

    def close(self) -> None:
        self._server.close()


def enter(invitation: Invitation, messages: Any, *, side: bool) -> Link:
    """A follower's link to its leader. Raises LinkClosed if nobody answers there."""
    try:
        connection = socket.create_connection((invitation.host, invitation.port), timeout=HELLO_S)
    except OSError as error:
        raise LinkClosed(f"no leader at {invitation.host}:{invitation.port}: {error}") from error
    link = Link(connection, messages)
    link.send(Join(invitation.secret, invitation.rank, side))
    return link


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        more = connection.recv(count - len(received))
        if not more:
            raise LinkClosed("closed before it said who it is")
        received += more
    return received


def _from_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        return value.dtype.str, value.shape, data if value.size else b""
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _to_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()  # writable, as torch wants it
    raise NotImplementedError(f"{kind.__name__} does not travel")
