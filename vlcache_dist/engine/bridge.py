"""An engine's thread as seen from an event loop: calls are awaitable, events arrive in one queue per request."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from vlcache_dist.engine.api import Event, Failed, TokenEvent
from vlcache_dist.engine.driver import EngineDriver
from vlcache_dist.engine.engine import Engine
from vlcache_dist.errors import DeadlineExceeded, EngineError, WorkerLost
from vlcache_dist.types import FinishReason, TokenLogprobs
from vlcache_dist.wire import Tokens

T = TypeVar("T")
SWITCH_S = 2e-4  #: how long the engine's thread may keep the interpreter from the event loop and the transport


class OnEngine(Protocol):
    """Runs a function in the engine's thread and awaits its result."""

    def __call__(self, function: Callable[[Engine], T]) -> Awaitable[T]: ...


class EngineBridge:
    """Belongs to one event loop, which ``start`` must run in. Events of requests that were closed are dropped,
    except that ``on_stray`` sees them (records that end after their request must still be told to the directory)."""

    def __init__(self, engine: Engine, on_stray: Callable[[Event], None], name: str = "engine") -> None:
        self._engine = engine
        self._driver = EngineDriver(engine, self._from_engine, self._crashed, name)
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._on_stray = on_stray
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine.runner.on_lost(self._driver.fail)
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._driver.start()

    async def close(self) -> None:
        """Stop the engine's thread, and what its runner has started."""
        await asyncio.to_thread(self._driver.close)
        await asyncio.to_thread(self._engine.runner.close)

    @property
    def healthy(self) -> bool:
        return self._driver.healthy

    @property
    def busy_s(self) -> float:
        return self._driver.busy_s

    def call(self, function: Callable[[Engine], T]) -> Awaitable[T]:
        """Run ``function(engine)`` between two steps. Raises what it raises, WorkerLost if the engine is gone."""
        return asyncio.wrap_future(self._driver.call(function))

    def open(self, request_id: str) -> asyncio.Queue[Event]:
        """The queue of a request's events, until ``shut``. Raises ValueError if it is open already."""
        if request_id in self._queues:
            raise ValueError(f"request {request_id} is here already")
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[request_id] = queue
        return queue

    def shut(self, request_id: str) -> None:
        """Close a request's queue; what nobody has read is stray. Idempotent."""
        queue = self._queues.pop(request_id, None)
        while queue is not None and not queue.empty():
            self._on_stray(queue.get_nowait())

    @staticmethod
    async def next_event(queue: asyncio.Queue[Event], deadline: float) -> Event:
        """The next event before ``deadline`` (loop clock). Raises DeadlineExceeded, or a ``Failed``'s error."""
        try:
            async with asyncio.timeout_at(deadline):
                event = await queue.get()
        except TimeoutError:
            raise DeadlineExceeded("the request's time is over") from None
        if isinstance(event, Failed):
            raise event.error
        return event

    def _from_engine(self, event: Event) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, event)
        except RuntimeError:
            return  # the loop is closed: nobody is left to hear

    def _deliver(self, event: Event) -> None:
        queue = self._queues.get(event.request_id)
        if queue is None:
            self._on_stray(event)
        else:
            queue.put_nowait(event)

    def _crashed(self, error: BaseException) -> None:
        assert self._loop is not None

        def tell() -> None:
            lost = WorkerLost(f"the engine stopped: {type(error).__name__}: {error}")
            for request_id, queue in self._queues.items():
                queue.put_nowait(Failed(request_id, lost))

        self._loop.call_soon_threadsafe(tell)


async def next_tokens(queue: asyncio.Queue[Event], deadline: float) -> Tokens:
    """All tokens of a decoding request that are there now, at least one. Raises as ``EngineBridge.next_event``."""
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish: FinishReason | None = None
    while finish is None and (not ids or not queue.empty()):
        event = await EngineBridge.next_event(queue, deadline)
        if not isinstance(event, TokenEvent):
            raise EngineError(f"{type(event).__name__} while decoding")
        ids.append(event.token_id)
        if event.logprobs is not None:
            logprobs.append(event.logprobs)
        finish = event.finish
    return Tokens(tuple(ids), tuple(logprobs), finish)
