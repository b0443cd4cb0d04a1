"""The engine's thread: calls between steps, events out, and what happens when a step dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from vlcache_dist.engine import driver as driver_module
from vlcache_dist.engine.api import TokenEvent
from vlcache_dist.engine.bridge import EngineBridge
from vlcache_dist.engine.driver import EngineDriver
from vlcache_dist.engine.engine import Engine
from vlcache_dist.errors import DeadlineExceeded, EngineError, Overloaded, WorkerLost


class Counting:
    """As much of an engine as the driver needs: emits one token per pending step."""

    def __init__(self) -> None:
        self.pending = 0
        self.thread: int | None = None
        self.fail = False
        self.chores = 2
        self.runner = self  # as far as the bridge needs one
        self.lose: Callable[[BaseException], None] = lambda error: None
        self.closed = False

    def on_lost(self, tell: Callable[[BaseException], None]) -> None:
        self.lose = tell

    def close(self) -> None:
        self.closed = True

    def has_work(self) -> bool:
        return self.pending > 0

    def idle(self) -> bool:
        self.chores -= 1
        return self.chores > 0

    def step(self, now: float) -> list[Any]:
        self.thread = threading.get_ident()
        if self.fail:
            raise RuntimeError("the device is gone")
        self.pending -= 1
        return [TokenEvent("r", self.pending, None, None)]


@pytest.fixture
def counting() -> Counting:
    return Counting()


def test_calls_run_in_the_engines_thread_and_return_or_raise(counting: Counting) -> None:
    events: list[Any] = []
    arrived = threading.Event()
    driver = EngineDriver(counting, lambda event: (events.append(event), arrived.set()), lambda error: None)
    driver.start()
    try:
        assert driver.call(lambda engine: threading.get_ident()).result(5) != threading.get_ident()

        def refuse(engine: Any) -> None:
            raise Overloaded("full")

        with pytest.raises(Overloaded):
            driver.call(refuse).result(5)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            driver.call(lambda engine: 1 / 0).result(5)
        driver.call(lambda engine: setattr(engine, "pending", 1)).result(5)
        assert arrived.wait(5) and events[0].token_id == 0
        assert driver.healthy and driver.busy_s > 0
    finally:
        driver.close()
    assert not driver.healthy
    with pytest.raises(WorkerLost):
        driver.call(lambda engine: None).result(5)


def test_an_idle_driver_does_its_chores_once_and_sleeps(counting: Counting) -> None:
    driver = EngineDriver(counting, lambda event: None, lambda error: None)
    driver.start()
    deadline = time.monotonic() + 10
    while counting.chores > 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert driver.call(lambda engine: engine.chores).result(10) == 0
    driver.close()
    assert counting.chores <= 0, "and once more when the call had been served"


def test_chores_take_a_small_share_of_the_time_and_nobody_waits_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "IDLE_SHARE", 0.001)

    class Chores(Counting):
        def idle(self) -> bool:
            time.sleep(0.01)
            return super().idle()

    engine = Chores()
    engine.chores = 100
    driver = EngineDriver(engine, lambda event: None, lambda error: None)
    driver.start()
    time.sleep(0.1)
    assert driver.call(lambda engine: engine.chores).result(5) == 99, "the next is due after ten seconds"
    driver.close()


def test_a_step_that_dies_fails_everybody_who_waits(counting: Counting) -> None:
    crashed: list[BaseException] = []
    told = threading.Event()
    driver = EngineDriver(counting, lambda event: None, lambda error: (crashed.append(error), told.set()))
    driver.start()
    counting.fail = True
    driver.call(lambda engine: setattr(engine, "pending", 1))
    assert told.wait(5) and isinstance(crashed[0], RuntimeError)
    assert not driver.healthy
    with pytest.raises(WorkerLost, match="device is gone"):
        driver.call(lambda engine: None).result(5)
    driver.close()


async def test_the_bridge_sorts_events_by_request(counting: Counting) -> None:
    strayed = asyncio.Event()
    bridge = EngineBridge(_as_engine(counting), lambda event: strayed.set())
    bridge.start()
    try:
        queue = bridge.open("r")
        with pytest.raises(ValueError, match="here already"):
            bridge.open("r")
        loop = asyncio.get_running_loop()
        await bridge.call(lambda engine: setattr(engine, "pending", 1))
        event = await bridge.next_event(queue, loop.time() + 5)
        assert isinstance(event, TokenEvent)
        with pytest.raises(DeadlineExceeded):
            await bridge.next_event(queue, loop.time() + 0.01)
        bridge.shut("r")
        await bridge.call(lambda engine: setattr(engine, "pending", 1))
        async with asyncio.timeout(5):
            await strayed.wait()
        again = bridge.open("r")
        counting.fail = True
        await bridge.call(lambda engine: setattr(engine, "pending", 1))
        with pytest.raises(WorkerLost):
            await bridge.next_event(again, loop.time() + 5)
    finally:
        await bridge.close()
    assert counting.closed


def _as_engine(counting: Counting) -> Engine:
    return counting  # type: ignore[return-value]


def test_a_loss_ends_the_engine_although_its_thread_is_stuck() -> None:
    stuck, free = threading.Event(), threading.Event()
    crashes: list[str] = []

    class Stuck(Counting):
        def step(self, now: float) -> list[Any]:
            stuck.set()
            free.wait(10)
            raise RuntimeError("the collective was broken off")

    engine = Stuck()
    driver = EngineDriver(engine, lambda event: None, lambda error: crashes.append(str(error)))
    driver.start()
    driver.call(lambda engine: setattr(engine, "pending", 1)).result(5)
    assert stuck.wait(5)
    waiting = driver.call(lambda engine: engine.pending)
    driver.fail(WorkerLost("shard 1 is gone"))
    driver.fail(WorkerLost("shard 1 is gone"))
    with pytest.raises(WorkerLost, match="shard 1 is gone"):
        waiting.result(5)
    with pytest.raises(WorkerLost, match="shard 1 is gone"):
        driver.call(lambda engine: engine.pending).result(5)
    assert not driver.healthy
    free.set()
    driver.close()
    assert crashes == ["shard 1 is gone"]
