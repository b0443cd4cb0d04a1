"""Processes that a command under test started and did not end, detached ones included: they carry a mark in their
environment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

MARK = f"VLCACHE_TEST_MARK={os.getpid()}"


def marked() -> dict[str, str]:
    """The environment for a command under test."""
    name, _, value = MARK.partition("=")
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", name: value}


def alive() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if MARK.encode() in environment.split(b"\0") and state != "Z":
                found.add(int(entry.name))
    return found


def gone(patience_s: float = 15.0) -> bool:
    """True once nothing is left."""
    deadline = time.monotonic() + patience_s
    while alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not alive()


def kill() -> None:
    for pid in alive():
        os.kill(pid, signal.SIGKILL)
