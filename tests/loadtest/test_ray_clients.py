"""Clients as Ray tasks on a cluster of two nodes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from caching_server import CachingBackend, Served
from ray.cluster_utils import Cluster

from vlcache_dist.errors import WorkerLost
from vlcache_dist.loadtest import actor
from vlcache_dist.loadtest.client import Job, Target
from vlcache_dist.loadtest.dataset import Request, render
from vlcache_dist.loadtest.scenario import SCENARIOS, plan

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        actor.join(cluster.address)
        yield cluster.address
    finally:
        actor.leave()
        cluster.shutdown()


def jobs(url: str, count: int) -> list[Job]:
    scenario = SCENARIOS["document-qa"]
    requests: list[Request] = render(scenario, plan(scenario, 0.5, count, 1), 1)
    start = time.time() + 6.0  # workers' processes start in it
    times = [number * 0.05 for number in range(count)]
    return [
        Job(f"client-{i}", Target(url, "tiny"), "approx", start, tuple(times[i::2]), tuple(requests[i::2]), 10.0)
        for i in range(2)
    ]


def test_clients_on_two_nodes_keep_one_schedule(address: str, served: Served, backend: CachingBackend) -> None:
    nodes = actor.places("http://10.0.0.1:8000")
    assert actor.is_joined() and len(nodes) == 2 and actor.places(served.url)[0] in nodes
    records = [record for batch in actor.drive_on_nodes(jobs(served.url, 20), nodes) for record in batch]
    assert sorted(record.index for record in records) == list(range(20))
    assert {record.client for record in records} == {"client-0", "client-1"}
    assert {record.status for record in records} == {"answered"}
    records.sort(key=lambda record: record.sent_s)
    assert max(record.sent_s - record.scheduled_s for record in records) < 1.0
    assert [record.index for record in records] != [r.index for r in sorted(records, key=lambda r: r.client)]


def test_a_lost_client_is_told(address: str, served: Served) -> None:
    broken = jobs(served.url, 4)
    broken[1] = Job("client-1", broken[1].target, "approx", 0.0, (0.0,), (), 1.0)  # arrivals without requests
    with pytest.raises(WorkerLost, match="a load client was lost"):
        for _ in actor.drive_on_nodes(broken, actor.places(served.url)):
            pass
