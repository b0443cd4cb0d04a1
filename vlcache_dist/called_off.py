"""Work that is called off although it may have succeeded: what it brings is let go, now or when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def call_off(task: asyncio.Task[T], let_go: Callable[[T], None]) -> None:
    """Cancel ``task``; a result that it has, or comes to have all the same, goes to ``let_go`` once. Waits for nothing,
    so that no cancellation of the caller can come between."""

    def over(task: asyncio.Task[T]) -> None:
        if not task.cancelled() and task.exception() is None:
            let_go(task.result())

    task.cancel()
    if task.done():
        over(task)
    else:
        task.add_done_callback(over)
