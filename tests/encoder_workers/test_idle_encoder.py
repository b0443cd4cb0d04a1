"""What an encoder does before its first picture and between pictures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

from vlcache_dist.encoder_workers import worker as encoder
from vlcache_dist.encoder_workers.worker import EncoderWorker
from vlcache_dist.model.graph_policy import GraphReport


class Tower:
    """Has ``chores`` to do when nobody waits; each takes ``chore_s``."""

    def __init__(self, chores: int, chore_s: float) -> None:
        self.chores, self.chore_s = chores, chore_s
        self.log: list[str] = []
        self.done = threading.Event()

    def forward(self, patches: torch.Tensor, grids: Any) -> torch.Tensor:
        raise NotImplementedError

    def warm_up(self, graph_s: float) -> None:
        self.log.append(f"warm-up {graph_s}")

    def prepare(self) -> bool:
        if not self.chores:
            self.done.set()
            return False
        time.sleep(self.chore_s)
        self.chores -= 1
        self.log.append("chore")
        return True

    def graph_report(self) -> GraphReport:
        return GraphReport(self.log.count("chore"), self.chores, 0, 0, 0, 0, 0.0)


class Node:
    """Takes handlers and runs what it is given."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Any]] = []

    def handle(self, *arguments: Any) -> None: ...

    on_load = on_status = on_health = handle

    async def start(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(asyncio.create_task(work))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()


async def started(tower: Tower) -> EncoderWorker:
    worker = EncoderWorker(Node(), tower, None, graph_start_s=2.5)  # type: ignore[arg-type]
    await worker.start()
    return worker


async def test_warm_up_comes_first_and_chores_are_done_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "IDLE_SHARE", 1.0)
    tower = Tower(chores=3, chore_s=0.0)
    worker = await started(tower)
    assert tower.log[0] == "warm-up 2.5"
    assert await asyncio.to_thread(tower.done.wait, 10)
    status = worker.status()["graphs"]
    assert isinstance(status, dict) and status["captured"] == 3 and status["planned"] == 0
    await worker.close()


async def test_chores_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "IDLE_SHARE", 0.001)
    tower = Tower(chores=100, chore_s=0.01)  # the next one is due after ten seconds
    worker = await started(tower)
    await asyncio.sleep(0.1)
    assert tower.chores == 99
    await worker.close()
