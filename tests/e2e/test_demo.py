"""The main job as a user starts it: a process of its own, a real cluster, JSON on the last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "VLCACHE_TEST_MARK": str(os.getpid())}


def _children() -> set[int]:
    """Processes that carry this test's mark in their environment: everything the command started, also detached."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"VLCACHE_TEST_MARK={os.getpid()}".encode() in environment and state != "Z":
                found.add(int(entry.name))
    return found


def _gone(patience_s: float = 15.0) -> bool:
    deadline = time.monotonic() + patience_s
    while _children() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not _children()


@pytest.fixture(autouse=True)
def _no_survivors():
    yield
    for pid in _children():
        os.kill(pid, signal.SIGKILL)


def test_the_demo_reuses_an_image_across_workers_and_answers_right() -> None:
    command = [sys.executable, "-m", "vlcache_dist.cli", "demo", "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    rows = {row["name"]: row for row in report["requests"]}
    assert report["ok"] and all(row["correct"] and row["matches_full"] for row in rows.values())
    cold, warm = rows["cold"], rows["behind a long text"]
    assert cold["kv_source"] == "computed" and cold["reused_tokens"] == 0
    assert warm["kv_source"] == "remote" and warm["prefill_worker"] != cold["prefill_worker"]
    assert warm["vision_tokens"] == 144 and warm["recomputed_tokens"] == 8 and warm["reused_tokens"] == 136
    assert warm["bytes_moved"] == 144 * 2 * 10 * 2 * 64 * 4  # tokens x K and V x layers x KV heads x head size x fp32
    slot = rows["same slot, other pictures"]
    assert slot["kv_source"] == "remote" and slot["vision_tokens"] == 192 and slot["reused_tokens"] == 60
    assert _gone(), "the demo left processes behind"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_the_demo_is_interrupted(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "vlcache_dist.cli", "demo"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "encoder" in line:  # Ray is up, the pools are starting
                break
        time.sleep(2.0)
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130, said
    assert _gone(), "an interrupted demo left processes behind"
