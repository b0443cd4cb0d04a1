"""The open-loop client over real sockets."""

from __future__ import annotations

import threading
import time

import pytest
from caching_server import CachingBackend, Served

from vlcache_dist.loadtest.client import DEAD_AFTER, Job, Target, drive
from vlcache_dist.loadtest.dataset import Request, render
from vlcache_dist.loadtest.records import Record
from vlcache_dist.loadtest.scenario import SCENARIOS, plan


def requests(count: int) -> tuple[Request, ...]:
    scenario = SCENARIOS["document-qa"]
    return tuple(render(scenario, plan(scenario, 0.5, count, 1), 1))


def job(url: str, count: int, gap_s: float, timeout_s: float = 10.0, keys: tuple[str, ...] = ()) -> Job:
    times = tuple(number * gap_s for number in range(count))
    return Job("c", Target(url, "tiny", keys), "approx", time.time() + 0.3, times, requests(count), timeout_s)


def collect(job: Job) -> list[Record]:
    return sorted((record for batch in drive(job) for record in batch), key=lambda record: record.index)


def test_requests_leave_on_schedule_although_none_is_answered_yet(served: Served, backend: CachingBackend) -> None:
    backend.cost_s = 1.0
    records = collect(job(served.url, 10, 0.03))
    assert [record.status for record in records] == ["answered"] * 10
    assert backend.at[-1] - backend.at[0] < 0.8  # a client that waits for answers would need 10 s
    assert all(record.sent_s >= record.scheduled_s - 0.005 for record in records)
    cold = records[0]
    assert cold.ttft_ms >= 1000 and cold.total_ms >= cold.ttft_ms
    assert len(cold.itl_ms) == 1 and cold.answer == "42" and cold.completion_tokens == 2
    assert cold.images[0]["source"] == "computed" and cold.decode_worker == "decode-0"


def test_time_to_first_token_counts_from_the_schedule(served: Served) -> None:
    late = job(served.url, 1, 0.0)
    late = Job(late.client, late.target, late.reuse, time.time() - 2.0, late.arrivals, late.requests, 30.0)
    (record,) = collect(late)
    assert record.ttft_ms > 2000 and record.sent_s > 2.0


def test_refusals_are_not_failures(served: Served, backend: CachingBackend) -> None:
    backend.refuse_every = 2
    records = collect(job(served.url, 6, 0.05))
    assert sorted(record.status for record in records) == ["answered"] * 3 + ["refused"] * 3
    assert {record.http_status for record in records if record.status == "refused"} == {503}


def test_a_request_without_an_answer_has_failed(served: Served, backend: CachingBackend) -> None:
    backend.cost_s = 5.0
    (record,) = collect(job(served.url, 1, 0.0, timeout_s=0.5))
    assert record.status == "failed" and "0.5 s" in record.error


def test_nobody_there() -> None:
    records = collect(job("http://127.0.0.1:9", DEAD_AFTER + 4, 0.06))
    assert {record.status for record in records} == {"failed"} and len(records) == DEAD_AFTER + 4
    assert "no connection" in records[0].error and records[-1].error.startswith("not sent")


def test_leaving_early_cancels_what_is_under_way(served: Served, backend: CachingBackend) -> None:
    backend.cost_s = 0.0
    batches = drive(job(served.url, 3, 20.0))
    assert next(batches)[0].status == "answered"
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 10.0
    assert not [thread for thread in threading.enumerate() if thread.name == "c"]


@pytest.mark.parametrize("tenant", [0, 1, 2])
def test_a_tenant_sends_with_its_key(tenant: int) -> None:
    target = Target("http://x", "tiny", ("a", "b"))
    assert target.headers(tenant) == {"authorization": f"Bearer {'ab'[tenant % 2]}"}
    assert Target("http://x", "tiny").headers(tenant) == {}
