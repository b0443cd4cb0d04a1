"""Processes that were started and must not stay: found by a mark in their environment, wherever they have got to,
because the children of a process that died are nobody's children."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vlcache_dist.errors import WorkerLost


def end_with_parent() -> None:
    """In a process that multiprocessing started: be gone when the parent is, however that one ended. (A pool whose
    parent was killed would finish what it has at hand, for minutes, and for nobody.)"""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def marked(name: str, value: str) -> list[int]:
    """Ids of the processes that were started with the environment variable ``name`` = ``value``, but this one."""
    wanted = f"{name}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z" and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end(pids: Callable[[], list[int]], patience_s: float = 5.0) -> None:
    """End the processes that ``pids()`` names: ask, wait, kill, until there are none. Raises WorkerLost if some will
    not go."""
    deadline = time.monotonic() + patience_s
    number = signal.SIGTERM
    while alive := [pid for pid in pids() if pid != os.getpid()]:
        if time.monotonic() > deadline + patience_s:
            raise WorkerLost(f"processes {alive} do not end")
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.2)
