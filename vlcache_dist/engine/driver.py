"""Runs an engine in a thread of its own, so that an event loop can serve requests while tensors are computed.

Everything that touches the engine is a function handed to ``call``; it runs between two steps. Events of a request
go to the callback it was registered with, in the engine's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from vlcache_dist.errors import EngineError, VLCacheError, WorkerLost

log = logging.getLogger(__name__)
T = TypeVar("T")
IDLE_SHARE = 0.05  #: of the time that an engine may use when nobody waits: who comes meanwhile does wait


class SteppingEngine(Protocol):
    """What the driver needs of an engine."""

    def has_work(self) -> bool: ...

    def step(self, now: float) -> list[Any]: ...

    def idle(self) -> bool: ...


class EngineDriver:
    """Owns ``engine`` from ``start`` to ``close``.

    ``on_event`` receives every event a step returns. A step that raises is fatal for the engine: ``on_crash`` is
    told, later calls fail with WorkerLost, and the worker's health check turns false.
    """

    def __init__(
        self,
        engine: SteppingEngine,
        on_event: Callable[[Any], None],
        on_crash: Callable[[BaseException], None],
        name: str = "engine",
    ) -> None:
        self.engine = engine
        self._on_event = on_event
        self._on_crash = on_crash
        self._calls: deque[tuple[Callable[[Any], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.crashed: BaseException | None = None
        self.busy_s = 0.0
        self._idle_at = 0.0  # not to be idle before
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self.crashed is None and self._thread.is_alive()

    def fail(self, error: BaseException) -> None:
        """Something the engine cannot do without is lost: nobody waits for it any more, whatever its thread is stuck
        in. Any thread; idempotent."""
        with self._wake:
            if self.crashed is not None or self._closing:
                return
            self.crashed = error
            self._wake.notify()
        self._fail_waiting(WorkerLost(f"the engine stopped: {type(error).__name__}: {error}"))
        self._on_crash(error)

    def call(self, function: Callable[[Any], T]) -> Future[T]:
        """Run ``function(engine)`` in the engine's thread. Fails with WorkerLost if the engine is gone."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing or self.crashed is not None:
                future.set_exception(WorkerLost(f"the engine has stopped: {self.crashed or 'shut down'}"))
                return future
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish the step under way and stop. Calls that still wait fail with WorkerLost."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        self._fail_waiting(WorkerLost("the worker is shutting down"))

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._run_calls()
                if not self.engine.has_work():
                    continue
                started = time.perf_counter()
                for event in self.engine.step(time.monotonic()):
                    self._on_event(event)
                self.busy_s += time.perf_counter() - started
        except BaseException as error:  # the thread's last word: everybody who waits must hear it
            log.exception("the engine stopped")
            self.fail(error)

    def _wait_for_work(self) -> bool:
        """Idle, then sleep, until there is a call or work; False when closing."""
        prepared = False
        while True:
            with self._wake:
                if self._over or self._calls or self.engine.has_work():
                    return not self._over
                pause = self._idle_at - time.monotonic()
                if prepared or pause > 0:
                    self._wake.wait(None if prepared else pause)
                    continue
            started = time.monotonic()
            prepared = not self.engine.idle()
            now = time.monotonic()
            self._idle_at = now + (now - started) * (1 / IDLE_SHARE - 1)

    @property
    def _over(self) -> bool:
        return self._closing or self.crashed is not None

    def _run_calls(self) -> None:
        while True:
            with self._wake:
                if not self._calls:
                    return
                function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(self.engine))
            except VLCacheError as error:
                future.set_exception(error)
            except Exception as error:
                log.exception("a call into the engine failed")
                future.set_exception(EngineError(f"{type(error).__name__}: {error}"))

    def _fail_waiting(self, error: VLCacheError) -> None:
        with self._wake:
            waiting, self._calls = list(self._calls), deque()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
