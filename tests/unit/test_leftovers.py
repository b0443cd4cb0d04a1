"""Processes are found by their mark, whoever their parent is, and ended even if they will not listen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vlcache_dist.errors import WorkerLost
from vlcache_dist.leftovers import end, marked

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
