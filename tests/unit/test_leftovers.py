"""Processes are found by their mark, whoever their parent is, and ended even if they will not listen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlcache_dist.errors import WorkerLost
from vlcache_dist.leftovers import end, end_with_parent, marked

NAME, VALUE = "VLCACHE_TEST_LEFTOVER", f"{os.getpid()}"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, NAME: VALUE}
    command = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process
        process.kill()


def test_a_process_that_ignores_the_request_is_killed(stubborn: subprocess.Popen[str]) -> None:
    assert marked(NAME, VALUE) == [stubborn.pid] and marked(NAME, f"{VALUE}0") == []
    end(lambda: marked(NAME, VALUE), patience_s=0.3)
    assert marked(NAME, VALUE) == [] and stubborn.wait(10) == -9


def test_what_does_not_end_is_said() -> None:
    with pytest.raises(WorkerLost, match="do not end"):
        end(lambda: [2**22 + 1], patience_s=0.1)  # above every process id: nothing is hit, and it stays on the list


def _wait_for_ever(path: str) -> None:
    end_with_parent()
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


_PARENT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, sys.argv[2])
from test_leftovers import _wait_for_ever
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_wait_for_ever, sys.argv[1]).result()
"""


def test_a_pool_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script, told = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(_PARENT)
    parent = subprocess.Popen([sys.executable, str(script), str(told), str(Path(__file__).parent)])
    try:
        deadline = time.monotonic() + 60
        while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        child = int(told.read_text())
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while (alive := _runs(child)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
