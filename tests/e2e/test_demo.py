"""The main job as a user starts it: a process of its own, a real cluster, JSON on the last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import leftovers
import pytest

pytestmark = pytest.mark.cluster

ENVIRONMENT = leftovers.marked()


@pytest.fixture(autouse=True)
def _no_survivors():
    yield
    leftovers.kill()


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
    assert warm["vision_tokens"] == 144 and warm["recomputed_tokens"] == 3 and warm["reused_tokens"] == 141
    assert warm["bytes_moved"] == 144 * 2 * 10 * 2 * 64 * 4  # tokens x K and V x layers x KV heads x head size x fp32
    slot = rows["same slot, other pictures"]
    assert slot["kv_source"] == "remote" and slot["vision_tokens"] == 192 and slot["reused_tokens"] == 61
    assert leftovers.gone(), "the demo left processes behind"


@pytest.mark.parametrize("whole_group", [False, True], ids=["Ctrl-C", "SIGTERM to all processes"])
def test_nothing_is_left_when_the_demo_is_interrupted(whole_group: bool) -> None:
    """A service manager signals all processes at once, so that Ray's die before they can be asked to end."""
    command = [sys.executable, "-m", "vlcache_dist.cli", "demo"]
    options = {"env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "encoder" in line:  # Ray is up, the pools are starting
                break
        time.sleep(1.0)
        if whole_group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130, said
    assert leftovers.gone(), "an interrupted demo left processes behind"
