"""Requests that are held up in the middle, and given up there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pools import Pools


class Gate:
    """Holds a function up in the middle of a request; ``opened`` lets it go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(20)
        return self._function(*args, **kwargs)


def start(pools: Pools, *parts: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(pools.ask(*parts, **options))


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
