"""Pieces of an evaluation over processes: each has its own model, the caller keeps the journal."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vlcache_dist.errors import ConfigError, WorkerLost
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.leftovers import end_with_parent


@dataclass(frozen=True, slots=True)
class BenchSpec:
    """What a worker process builds its ``Workbench`` from."""

    model: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    max_answer: int = 12
    trials: int = 1

    def build(self) -> Workbench:
        return Workbench(
            self.model, device=self.device, dtype=self.dtype, max_answer=self.max_answer, trials=self.trials
        )


@dataclass(frozen=True, slots=True)
class Unit:
    """``work`` returns JSON values by key, for ``keys``; it and they cross process borders by pickle. ``about``: the
    batch that it is about."""

    keys: tuple[str, ...]
    work: Callable[[Workbench], dict[str, Any]]
    about: tuple[str, int] = ("", 0)


def joined(journal: Journal, *lists: Sequence[Unit]) -> list[Unit]:
    """Units about the same batch as one, so that it is recorded and computed in full once; what ``journal`` has is left
    out, where anything else is left."""
    groups: dict[tuple[str, int], list[Unit]] = {}
    for unit in (unit for units in lists for unit in units):
        groups.setdefault(unit.about, []).append(unit)
    out = []
    for about, units in groups.items():
        todo = [unit for unit in units if any(key not in journal for key in unit.keys)] or units
        keys = tuple(key for unit in todo for key in unit.keys)
        out.append(Unit(keys, partial(_all, tuple(unit.work for unit in todo)), about))
    return out


def _all(works: tuple[Callable[[Workbench], dict[str, Any]], ...], bench: Workbench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for work in works:
        found |= work(bench)
    return found


_bench: Workbench | None = None  # of this worker process


def _start(spec: BenchSpec, threads: int) -> None:
    global _bench
    end_with_parent()
    torch.set_num_threads(threads)
    _bench = spec.build()


def _run(unit: Unit) -> dict[str, Any]:
    assert _bench is not None
    return unit.work(_bench)


def run_units(
    spec: BenchSpec,
    units: Sequence[Unit],
    journal: Journal,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    bench: Workbench | None = None,
) -> None:
    """Do those units of which ``journal`` lacks a key, and note each as it is done. With one worker it is done here,
    by ``bench`` if there is one. ``progress``: units done, the earlier ones included, and all. What is noted stays
    when this raises: a unit's own error, or WorkerLost if a process died (memory, mostly). Raises ConfigError for
    ``workers`` below 1."""
    if workers < 1:
        raise ConfigError(f"workers {workers}: at least 1")
    todo = [unit for unit in units if any(key not in journal for key in unit.keys)]
    done = len(units) - len(todo)
    progress(done, len(units))
    if not todo:
        return
    if workers == 1:
        bench = bench or spec.build()
        for unit in todo:
            journal.add(unit.work(bench))
            done += 1
            progress(done, len(units))
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(
        min(workers, len(todo)), multiprocessing.get_context("spawn"), initializer=_start, initargs=(spec, threads)
    )
    try:
        pending = {pool.submit(_run, unit) for unit in todo}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                journal.add(future.result())
                done += 1
                progress(done, len(units))
    except BrokenProcessPool as error:
        raise WorkerLost(f"a worker process ended: {error}; the same command goes on with what is left") from error
    finally:
        pool.shutdown(cancel_futures=True)
