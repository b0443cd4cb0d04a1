"""Both ends of the side link: READs and checksums on a follower's arena, and signs of life."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import torch

from vlcache_dist.errors import TransferFailed, VLCacheError, from_code
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.link import Link, LinkClosed
from vlcache_dist.transfer.base import Transfer, Transport
from vlcache_dist.transfer.checksum import checksum

log = logging.getLogger(__name__)

SILENCE_S = 5.0  #: a follower that gives no sign of life for so long is lost
LISTEN_S = 0.25


class FollowerSide:
    """A follower's end. One thread receives, one gives signs of life; what may take long is done in a pool."""

    def __init__(self, link: Link, on_leader_lost: Callable[[], None]) -> None:
        self._link = link
        self._on_leader_lost = on_leader_lost
        self._closed = threading.Event()
        self._transport: Transport | None = None
        self._arena: torch.Tensor | None = None
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shard-side")
        self._late: list[tuple[int, Transfer]] = []  # READs that failed and may still write
        self._late_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=work, name=f"shard-{work.__name__.strip('_')}", daemon=True)
            for work in (self._listen, self._beat)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def serve(self, transport: Transport, arena: torch.Tensor) -> None:
        """From here on READs and checksums are possible. Takes the transport over."""
        self._transport, self._arena = transport, arena

    def last_word(self, message: str) -> None:
        self._say(p.LastWord(message))

    def close(self) -> None:
        """Close the link and the transport. Idempotent."""
        self._closed.set()
        self._link.close()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
        self._pool.shutdown()
        if self._transport is not None:
            self._transport.close()

    def _listen(self) -> None:
        try:
            while True:
                self._do(self._link.receive())
        except LinkClosed:
            if not self._closed.is_set():
                self._closed.set()
                self._on_leader_lost()
        except Exception:
            log.exception("the side link of a follower failed")
            self._link.close()

    def _beat(self) -> None:
        while not self._closed.wait(p.BEAT_S):
            self._say(p.Beat())
            with self._late_lock:
                over = [name for name, transfer in self._late if transfer.terminal]
                self._late = [(name, transfer) for name, transfer in self._late if not transfer.terminal]
            for name in over:
                self._say(p.Ended(name))

    def _do(self, command: Any) -> None:
        match command:
            case p.Read():
                self._read(command)
            case p.Connect():
                self._pool.submit(self._answer, command.id, lambda: self._there().connect(command.peer))
            case p.Digest():
                self._pool.submit(self._answer, command.id, lambda: self._checksum(command))
            case p.Disconnect():
                self._pool.submit(self._there().disconnect, command.agent)
            case p.Attend():
                self._there().attend(command.seconds)

    def _there(self) -> Transport:
        if self._transport is None:
            raise TransferFailed("this follower has no transport")
        return self._transport

    def _checksum(self, command: p.Digest) -> bytes:
        assert self._arena is not None
        return checksum(self._arena, command.offset, command.nbytes)

    def _read(self, command: p.Read) -> None:
        try:
            transfer = self._there().read(command.peer, command.pieces, command.deadline_s)
        except Exception as error:
            self._say(_answer(command.id, error))
            self._say(p.Ended(command.id))  # it never began
            return

        def done(future: Future[None]) -> None:
            error = future.exception()
            self._say(_answer(command.id, error))
            if error is not None:
                with self._late_lock:
                    self._late.append((command.id, transfer))

        transfer.future.add_done_callback(done)

    def _answer(self, name: int, work: Callable[[], bytes | None]) -> None:
        try:
            data = work()
        except Exception as error:
            self._say(_answer(name, error))
        else:
            self._say(p.Answer(name, data=data or b""))

    def _say(self, message: p.SideReply) -> None:
        try:
            self._link.send(message)
        except LinkClosed:
            self._closed.set()


def _answer(name: int, error: BaseException | None) -> p.Answer:
    if error is None:
        return p.Answer(name)
    if isinstance(error, VLCacheError):
        return p.Answer(name, error.code, str(error))
    return p.Answer(name, "TransferFailed", f"{type(error).__name__}: {error}")


class RemoteTransfer:
    """A follower's READ as its leader sees it (``transfer.base.Transfer``). It is also terminal when the follower is
    gone: its arena is gone with it."""

    def __init__(self, future: Future[Any], over: threading.Event) -> None:
        self.future = future
        self._over = over

    @property
    def terminal(self) -> bool:
        return self._over.is_set()


class LeaderSide:
    """A leader's end of one follower's side link. ``on_lost`` is called once, from this end's thread, if the follower
    dies, fails, or gives no sign of life for ``silence_s``."""

    def __init__(self, link: Link, rank: int, on_lost: Callable[[str], object], silence_s: float = SILENCE_S) -> None:
        self._link = link
        self._rank = rank
        self._on_lost = on_lost
        self._silence_s = silence_s
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._asked: dict[int, Future[Any]] = {}
        self._reading: dict[int, threading.Event] = {}
        self._gone = False
        self._closing = False
        self._thread = threading.Thread(target=self._listen, name=f"shard-{rank}-side", daemon=True)
        self._thread.start()

    def ask(self, command: p.Connect | p.Digest) -> Future[Any]:
        """Resolves to the answer's data. Fails with what the follower raised, TransferFailed if it is gone."""
        return self._send(command, None)

    def read(self, command: p.Read) -> RemoteTransfer:
        """Start a READ on the follower's arena."""
        over = threading.Event()
        return RemoteTransfer(self._send(command, over), over)

    def tell(self, command: p.Disconnect | p.Attend) -> None:
        """Nobody waits for it; a follower that is gone is noticed elsewhere."""
        try:
            self._link.send(command)
        except LinkClosed as error:
            log.info("shard %d was not told: %s", self._rank, error)

    def cut(self) -> None:
        """Close the link without waiting."""
        self._link.close()

    def close(self) -> None:
        """End the link; what was asked and not answered fails. Idempotent."""
        self._closing = True
        self._link.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _send(self, command: p.Connect | p.Digest | p.Read, over: threading.Event | None) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._gone:
                self._end(future, over)
                return future
            name = next(self._ids)
            self._asked[name] = future
            if over is not None:
                self._reading[name] = over
        try:
            self._link.send(msgspec.structs.replace(command, id=name))
        except LinkClosed:
            self._leave()
        return future

    def _end(self, future: Future[Any], over: threading.Event | None) -> None:
        if over is not None:
            over.set()
        if not future.done():
            future.set_exception(TransferFailed(f"shard {self._rank} is gone"))

    def _listen(self) -> None:
        why = ""
        heard = time.monotonic()
        try:
            while not why:
                try:
                    message = self._link.receive(LISTEN_S)
                except TimeoutError:
                    if time.monotonic() - heard > self._silence_s:
                        why = f"shard {self._rank} gives no sign of life"
                    continue
                heard = time.monotonic()
                if isinstance(message, p.LastWord):
                    why = f"a shard failed: {message.message}"
                else:
                    self._note(message)
        except LinkClosed as error:
            why = f"shard {self._rank} is gone: {error}"
        except Exception as error:
            log.exception("the side link of shard %d failed", self._rank)
            why = f"shard {self._rank} cannot be understood: {error}"
        self._leave()
        if not self._closing:
            self._on_lost(why)

    def _note(self, message: Any) -> None:
        if isinstance(message, p.Ended):
            with self._lock:
                over = self._reading.pop(message.id, None)
            if over is not None:
                over.set()
        if not isinstance(message, p.Answer):
            return
        with self._lock:
            future = self._asked.pop(message.id, None)
            over = None if message.code else self._reading.pop(message.id, None)
        if over is not None:  # a READ that succeeded is terminal
            over.set()
        if future is None:
            return
        if message.code:
            future.set_exception(from_code(message.code, f"shard {self._rank}: {message.message}"))
        else:
            future.set_result(message.data)

    def _leave(self) -> None:
        with self._lock:
            self._gone = True
            asked, self._asked = self._asked, {}
            reading, self._reading = self._reading, {}
        for over in reading.values():
            over.set()
        for future in asked.values():
            self._end(future, None)
