"""Several hosts on this machine: every worker on a host of its own, image KV between hosts, metrics on all."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from vlcache_dist.cli import app
from vlcache_dist.demo.run import run
from vlcache_dist.loadtest.records import Run
from vlcache_dist.localcluster import command as localcluster_command
from vlcache_dist.localcluster.cluster import MARK, METRICS_PORT, LocalCluster, running
from vlcache_dist.localcluster.hosts import NETNS, NoNamespaces, namespaces
from vlcache_dist.metrics import (
    DECLARED,
    DRIFT_AGREEMENT,
    DRIFT_KL,
    EVICTIONS,
    GUARD_LEVEL,
    GUARD_TRIPS,
    HEALTHY,
    MISSED_ALARMS,
    PREFIX_HIT_TOKENS,
    READ_BYTES,
    READ_FAILURES,
    REQUESTS,
    SHADOW_RUNS,
    SHADOW_SECONDS,
    SPANS_ESCALATED,
    SPANS_REUSED,
    SPANS_WATCHED,
    TTFT,
)

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
SELDOM = (  # a counter of nothing is absent, and so is what the guard says of formats that it has not compared yet
    *(EVICTIONS, READ_FAILURES, SPANS_WATCHED, SPANS_ESCALATED, PREFIX_HIT_TOKENS),
    *(GUARD_LEVEL, GUARD_TRIPS, DRIFT_KL, DRIFT_AGREEMENT, SHADOW_RUNS, SHADOW_SECONDS, MISSED_ALARMS),
)
CONFIG = ROOT / "deploy" / "serve" / "cpu-1e-2p-1d.yaml"


def permitted() -> bool:
    try:
        with namespaces(2, f"probe{os.getpid()}"):  # several processes collect at the same time
            return True
    except NoNamespaces:
        return False


needs_namespaces = pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted here")


def left_over() -> list[str]:
    """Namespaces and processes of local clusters."""
    found = [path.name for path in NETNS.glob("vlc-*")] if NETNS.exists() else []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"{MARK}=".encode() in environment and state != "Z":
                found.append(entry.name)
    return found


def exported_metrics(cluster: LocalCluster, expected: dict[str, float], patience_s: float = 40.0) -> dict[str, float]:
    """Sums over all hosts of what their Prometheus endpoints show of us, once all of it is there and ``expected`` is
    reached: samples travel every few seconds."""
    wanted = {metric.ray_name for metric in DECLARED if metric.kind != "histogram" and metric not in SELDOM}
    deadline = time.monotonic() + patience_s
    while True:
        sums: dict[str, float] = {}
        for host in cluster.hosts:
            page = httpx.get(f"http://{host.address}:{METRICS_PORT}/metrics").raise_for_status().text
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        reached = wanted <= set(sums) and all(sums[name] >= value for name, value in expected.items())
        if reached or time.monotonic() > deadline:
            assert wanted <= set(sums), f"not exported: {sorted(wanted - set(sums))}"
            return sums
        time.sleep(1.0)


def test_a_commands_exit_status_is_the_local_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    @contextmanager
    def cluster_of(config: Path, hosts: int, **options: Any) -> Iterator[Any]:
        assert config == CONFIG and hosts == 2 and options["isolate"]
        yield SimpleNamespace(run=lambda command: ran.append(command) or SimpleNamespace(returncode=7))

    monkeypatch.setattr(localcluster_command, "running", cluster_of)
    options = ["--config", str(CONFIG), "--hosts", "2"]
    done = CliRunner().invoke(app, ["localcluster", *options, "vlcache-dist", "loadtest", "--rate", "2"])
    assert done.exit_code == 7 and ran == [["vlcache-dist", "loadtest", "--rate", "2"]]


@needs_namespaces
def test_an_interrupted_start_leaves_nothing() -> None:
    command = [sys.executable, "-m", "vlcache_dist.cli", "localcluster", "--config", str(CONFIG), "--hosts", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting Ray" in line:
                break
        time.sleep(3.0)
        assert left_over(), "namespaces and Ray should be there"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130, said
    assert left_over() == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--hosts", "7"], r"7 hosts: a local cluster has 2 to 4"),
        (["--config", "nowhere.yaml"], r"cannot read nowhere\.yaml"),
        (["--config", str(ROOT / "mkdocs.yml")], r"no Serve config file with one application"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments: list[str], why: str) -> None:
    command = [sys.executable, "-m", "vlcache_dist.cli", "localcluster", *arguments]
    if "--config" not in arguments:
        command += ["--config", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and re.search(why, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and left_over() == []


def test_where_namespaces_are_not_permitted_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import ExitStack

    from vlcache_dist.localcluster import cluster

    monkeypatch.setattr(shutil, "which", lambda name: None)
    said: list[str] = []
    with ExitStack() as stack:
        hosts = cluster._hosts(stack, 3, "none", True, said.append)
    assert [host.address for host in hosts] == ["127.0.0.1"] * 3 and all(host.namespace is None for host in hosts)
    assert "not permitted" in said[0] and "iproute2" in said[0] and "several raylets" in said[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Four hosts; nothing of them is left afterwards. Tests that look for leftovers of others come before."""
    said: list[str] = []
    with running(CONFIG, 4, say=said.append) as cluster:
        yield cluster
    assert left_over() == [] and "stopping" in said


@needs_namespaces
def test_the_demo_across_four_hosts(cluster: LocalCluster) -> None:
    with cluster.head.inside():
        report = run(cluster.url, lambda text: None, api_key=cluster.api_key)
        status = cluster.status()
        asked = 2 * len(report.requests) + 2  # with reuse, without, and two warm-ups
        reused = sum(row.kv_source in ("local", "remote") for row in report.requests)
        expected = {REQUESTS.ray_name: asked, SPANS_REUSED.ray_name: reused, HEALTHY.ray_name: 4}
        exported = exported_metrics(cluster, expected)
    by_address = {host.address: host for host in cluster.hosts}
    at = {worker["name"]: by_address[worker["address"].split("/")[-1].split(":")[0]] for worker in status}
    assert len({host.name for host in at.values()}) == len(at) == 4, "every worker has a host of its own"
    assert report.ok, report
    rows = {row.name: row for row in report.requests}
    cold, warm = rows["cold"], rows["behind a long text"]
    assert warm.kv_source == "remote" and warm.bytes_moved > 1 << 20
    # The holder's host has sent at least the image's KV through its own network card.
    assert at[cold.prefill_worker].sent_bytes() > warm.bytes_moved
    assert {name: exported[name] for name in expected} == expected
    assert exported[READ_BYTES.ray_name] > warm.bytes_moved
    assert exported[f"{TTFT.ray_name}_count"] == asked


@needs_namespaces
def test_load_by_clients_on_every_host(cluster: LocalCluster, tmp_path: Path) -> None:
    load = ["--rate", "2", "--duration", "4", "--share", "50", "--seed", "22", "--out", str(tmp_path)]
    done = cluster.run([sys.executable, "-m", "vlcache_dist.cli", "loadtest", *load], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Run)
    assert found.clients == 4 and found.workers == {"encoder": 1, "prefill": 2, "decode": 1}
    (point,) = found.points
    assert {record.client for record in point.arms[1].records} == {f"client-{i}" for i in range(4)}
    assert point.arms[1].summary.hit_share > 0 and point.arms[0].summary.hit_share == 0
    assert all(arm.summary.answered == 8 and arm.summary.right >= 0.5 for arm in point.arms)
