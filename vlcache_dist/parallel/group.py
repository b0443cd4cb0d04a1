"""The leader's side of its followers: start them, tell them what to do, notice when one is lost, and leave none behind.

A group is whole or it is nothing: ranks that have not done the same steps can never be brought together again, so the
first loss, failure or hang of any rank ends all of them, and with them the worker.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from vlcache_dist.errors import EngineError, VLCacheError, WorkerLost, from_code
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.collective import Collective
from vlcache_dist.parallel.link import Doorway, Invitation, Link, LinkClosed, frame
from vlcache_dist.parallel.side import SILENCE_S, LeaderSide

log = logging.getLogger(__name__)

START_S = 120.0  #: for a follower's process to come up
LOAD_S = 1800.0  #: for the weights
HANG_S = 120.0  #: a step that takes longer hangs
END_S = 5.0  #: for a follower to end by itself

R = TypeVar("R", bound=p.Reply)


class Handle(Protocol):
    """A follower's process, thread or actor."""

    def alive(self) -> bool: ...

    def kill(self) -> None:
        """End it at once, whatever it does. Idempotent."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """True if it has ended by then."""
        ...


class Launcher(Protocol):
    """Starts followers on this machine."""

    host: str  #: an address of this machine that followers reach the leader at

    def start(self, invitation: Invitation) -> Handle: ...

    def device(self, rank: int, leader: str) -> str:
        """The device that a follower computes on, as its own process names it."""
        ...


class ShardGroup:
    """``size`` - 1 followers. Steps are posted by one thread at a time (the engine's); the rest is thread-safe."""

    def __init__(self, launcher: Launcher, size: int, *, silence_s: float = SILENCE_S, hang_s: float = HANG_S) -> None:
        """Raises WorkerLost if a follower does not come up; none is left behind then."""
        self.size = size
        self.host = launcher.host
        self.launcher = launcher
        self._hang_s = hang_s
        self._lock = threading.Lock()
        self._lost: WorkerLost | None = None
        self._tell: list[Callable[[BaseException], None]] = []
        self._busy_since: float | None = None
        self._closed = threading.Event()
        self._collective: Collective | None = None
        self._handles: list[Handle] = []
        self._steps: list[Link] = []
        self.sides: list[LeaderSide] = []
        self._watch = threading.Thread(target=self._watch_steps, name="shard-watch", daemon=True)
        try:
            self._gather(launcher, silence_s)
        except BaseException:
            self.close()
            raise
        self._watch.start()

    # -- life ---------------------------------------------------------------------------------------------------

    @property
    def lost(self) -> WorkerLost | None:
        """Why the group has ended, if it has."""
        return self._lost

    def on_lost(self, tell: Callable[[BaseException], None]) -> None:
        """Call ``tell`` (once, from any thread) when the group breaks; at once if it has."""
        with self._lock:
            self._tell.append(tell)
            lost = self._lost
        if lost is not None:
            tell(lost)

    def break_up(self, why: str) -> WorkerLost:
        """A rank is lost, or out of step: end all followers. Returns the error that says so. Idempotent."""
        with self._lock:
            if self._lost is not None:
                return self._lost
            self._lost = lost = WorkerLost(f"tensor-parallel worker: {why}")
            tell = list(self._tell)
        if not self._closed.is_set():
            log.error("%s", lost)
        for handle in self._handles:
            handle.kill()
        for side in self.sides:
            side.cut()
        for call in tell:
            try:
                call(lost)
            except Exception:
                log.exception("somebody could not be told of it")
        if self._collective is not None:
            self._collective.abort()
        return lost

    def close(self) -> None:
        """End the followers and wait until they are gone. Idempotent."""
        self._closed.set()
        for link in self._steps:
            link.close()
        for side in self.sides:
            side.close()
        end = time.monotonic() + END_S
        for handle in self._handles:
            if not handle.wait(max(0.0, end - time.monotonic())):
                handle.kill()
                handle.wait(END_S)
        if self._collective is not None:
            self._collective.abort()
        if self._watch.is_alive() and self._watch is not threading.current_thread():
            self._watch.join()

    def _gather(self, launcher: Launcher, silence_s: float) -> None:
        secret = secrets.token_hex(32)
        doorway = Doorway(launcher.host, secret)
        joined: dict[tuple[int, bool], Any] = {}
        try:
            for rank in range(1, self.size):
                self._handles.append(launcher.start(doorway.invitation(rank)))
            deadline = time.monotonic() + START_S
            while len(joined) < 2 * (self.size - 1):
                if not all(handle.alive() for handle in self._handles):
                    raise WorkerLost("a shard's process ended before it had joined its leader: see its log")
                if time.monotonic() > deadline:
                    raise WorkerLost(f"a shard's process did not join its leader within {START_S:.0f} s")
                if (entered := doorway.next(0.2)) is not None:
                    join, connection = entered
                    joined[join.rank, join.side] = connection
        except BaseException:
            for connection in joined.values():
                connection.close()
            raise
        finally:
            doorway.close()
        self._steps = [Link(joined[rank, False], p.REPLIES) for rank in range(1, self.size)]
        self.sides = [
            LeaderSide(Link(joined[rank, True], p.SIDE_REPLIES), rank, self.break_up, silence_s)
            for rank in range(1, self.size)
        ]

    def _watch_steps(self) -> None:
        """A rank that hangs keeps the others inside a collective: only time tells."""
        while not self._closed.wait(0.5):
            since = self._busy_since
            if since is not None and time.monotonic() - since > self._hang_s:
                self.break_up(f"a step has taken {self._hang_s:.0f} s")
                return

    # -- steps --------------------------------------------------------------------------------------------------

    def meet(self, make: Callable[[], Collective]) -> Collective:
        """Make the leader's end of the collectives while the followers make theirs."""
        self._collective = make()
        return self._collective

    @property
    def collective(self) -> Collective:
        if self._collective is None:
            raise EngineError("the ranks have not met yet")
        return self._collective

    def post(self, command: p.Command) -> None:
        """Tell all followers. Raises WorkerLost."""
        if self._lost is not None:
            raise self._lost
        encoded = frame(command)
        try:
            for link in self._steps:
                link.send_frame(encoded)
        except LinkClosed as error:
            raise self.break_up(f"a shard is gone: {error}") from error

    def confirm(self, kind: type[R], timeout_s: float | None = None) -> list[R]:
        """A reply of each follower, in order of ranks. Raises WorkerLost, or what a follower failed with."""
        replies: list[R] = []
        for link in self._steps:
            try:
                reply = link.receive(self._hang_s if timeout_s is None else timeout_s)
            except (LinkClosed, TimeoutError) as error:
                raise self.break_up(f"a shard does not answer: {error or 'time is up'}") from error
            if isinstance(reply, p.Failed):
                self.break_up(reply.message)
                raise from_code(reply.code, reply.message)
            if not isinstance(reply, kind):
                raise self.break_up(f"{type(reply).__name__} came instead of {kind.__name__}")
            replies.append(reply)
        return replies

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what this rank does together with the others. Whatever goes wrong inside leaves the ranks out of step:
        it breaks the group and is raised as WorkerLost."""
        self.begin()
        try:
            yield
        except WorkerLost:
            raise
        except VLCacheError as error:
            raise self.break_up(str(error)) from error
        except Exception as error:
            raise self.break_up(f"rank 0: {type(error).__name__}: {error}") from error
        finally:
            self.end()

    def begin(self) -> None:
        """A step is under way from here to ``end``: it must not take longer than ``hang_s``."""
        self._busy_since = time.monotonic()

    def end(self) -> None:
        self._busy_since = None
