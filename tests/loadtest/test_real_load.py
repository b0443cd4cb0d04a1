"""Short runs of the command as it is typed: a cluster, clients, the bundled model, a report that adds up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from test_load_run import check_page

from vlcache_dist.loadtest.records import Run

ROOT = Path(__file__).parents[2]
LOADTEST = [sys.executable, "-m", "vlcache_dist.cli", "loadtest"]


@pytest.mark.timeout(300)
def test_a_short_run_of_the_bundled_model(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("model: {device: cpu, dtype: float32}\nengine: {store_bytes: 67108864, kv_bytes: 67108864}\n")
    load = ["--rate", "3", "--duration", "2.5", "--share", "0", "--share", "75", "--clients", "2", "--seed", "21"]
    run = _run([*LOADTEST, *load, "--config", str(settings)], tmp_path)
    assert run.clients == 2 and run.workers == {"encoder": 1, "prefill": 2, "decode": 1}
    assert [point.share for point in run.points] == [0.0, 0.75]
    for point in run.points:
        off, approx = point.arms
        for arm in (off, approx):
            s = arm.summary
            assert s.sent == s.answered == 8 and s.refused == s.failed == 0
            assert s.ttft_p50 > 0 and sum(s.tokens.values()) == off.summary.tokens["computed"]
            assert arm.counters["vlcache_requests_total{status=200}"] == 8
            assert arm.counters["vlcache_prompt_tokens_total"] == sum(r.prompt_tokens for r in arm.records)
            assert {record.client for record in arm.records} == {"client-0", "client-1"}
            assert {sample.role for sample in arm.pools} >= {"prefill", "decode", "encoder"}
            assert s.right >= 0.75  # the model reads these pictures; its rare mistakes are its own
        assert off.summary.hit_share == 0.0 and off.summary.cached_share == 0.0
    cold, warm = (point.arms[1].summary for point in run.points)
    assert cold.hit_share == 0.0
    assert warm.hit_share > 0.3 and warm.recompute_share > 0


@pytest.mark.timeout(400)
def test_clients_and_workers_on_several_hosts(tmp_path: Path) -> None:
    load = ["--rate", "2", "--duration", "3", "--share", "50", "--seed", "22"]
    cluster = [sys.executable, "-m", "vlcache_dist.cli", "localcluster", "--hosts", "2"]
    run = _run([*cluster, *LOADTEST, *load], tmp_path)
    assert run.clients == 2 and run.workers == {"encoder": 1, "prefill": 2, "decode": 1}
    (point,) = run.points
    assert {record.client for record in point.arms[1].records} == {"client-0", "client-1"}
    assert point.arms[1].summary.hit_share > 0 and point.arms[0].summary.hit_share == 0
    assert all(arm.summary.answered == 6 and arm.summary.right >= 0.5 for arm in point.arms)


def _run(command: list[str], out: Path) -> Run:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [*command, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    run = msgspec.json.decode((out / "result.json").read_bytes(), type=Run)
    check_page((out / "report.html").read_text(), run)
    return run
