"""Metrics: declared once, counted from what workers say, shown by the ingress and by a sink alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vlcache_dist.metrics import (
    DECLARED,
    ENGINE_STEPS,
    HEALTHY,
    INGRESS,
    READ_FAILURES,
    REQUESTS,
    RUNNING,
    STORE_BYTES_QUARANTINED,
    TTFT,
    VISION_TOKENS,
    WORKER,
    Metric,
    Metrics,
    WorkerSamples,
)

STORE = {"quarantined": 3, "num_objects": 2, "num_leases": 1, "num_evictions": 4}
LOAD = {"running": 1, "waiting": 0, "waiting_tokens": 5, "kv_blocks_total": 8, "kv_blocks_free": 6}


def status(steps: int, failures: Mapping[str, int]) -> dict[str, Any]:
    engine = dict.fromkeys(
        ("prompt_tokens", "generated_tokens", "scattered_tokens", "spans_recorded", "spans_reused", "spans_watched",
         "spans_escalated", "finished", "aborted", "failed", "exact_hit_tokens", "approx_hit_tokens"), 0
    )  # fmt: skip
    transfers = {"reads": 0, "bytes_read": 0, "failures": failures}
    healthy = {"healthy": True, "draining": False}
    return {
        "store": STORE,
        "store_itemsize": 2,
        "transfers": transfers,
        "engine": {**engine, "steps": steps},
        **healthy,
    }


def test_names_follow_the_rules() -> None:
    names = [metric.name for metric in DECLARED]
    assert len(set(names)) == len(names) and DECLARED == INGRESS + WORKER
    for metric in DECLARED:
        assert metric.name.startswith("vlcache_") and metric.ray_name == f"ray_{metric.name}" and metric.help
        assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert all(metric.labels[:2] == ("worker", "role") for metric in WORKER)


def test_counters_of_a_worker_become_rises_and_gauges_stay() -> None:
    samples = WorkerSamples("prefill-0", "prefill")

    def take(*arguments: Any) -> dict[tuple[Metric, str], float]:
        found = {}
        for metric, labels, value in samples.of(*arguments):
            assert labels["worker"] == "prefill-0" and labels["role"] == "prefill"
            found[metric, labels.get("error", "")] = value
        return found

    first = take(status(10, {"ObjectGone": 1}), LOAD)
    assert first[ENGINE_STEPS, ""] == 10 and first[HEALTHY, ""] == 1
    assert first[STORE_BYTES_QUARANTINED, ""] == 3 * 2, "elements become bytes"
    assert first[READ_FAILURES, "ObjectGone"] == 1
    second = take(status(14, {"ObjectGone": 1, "TransferFailed": 2}), LOAD)
    assert second[ENGINE_STEPS, ""] == 4 and second[READ_FAILURES, "TransferFailed"] == 2
    assert (READ_FAILURES, "ObjectGone") not in second, "nothing rose"
    assert second[HEALTHY, ""] == 1


def test_the_ingress_tells_its_page_and_its_sink_the_same() -> None:
    told: list[tuple[str, float, dict[str, str]]] = []

    class Sink:
        def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
            told.append((metric.name, value, dict(labels)))

    metrics = Metrics(Sink())
    metrics.record(REQUESTS, status="200")
    metrics.record(TTFT, 0.03)
    image = {"source": "remote", "vision_tokens": 64, "recomputed_tokens": 4, "bytes_moved": 1000}
    metrics.finished(100, 60, 7, {"images": [image]})
    page = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert page["vlcache_requests_total", "200"] == 1 and page["vlcache_vision_tokens_total", "remote"] == 64
    assert page["vlcache_time_to_first_token_seconds_count",] == 1
    assert (REQUESTS.name, 1.0, {"status": "200"}) in told and (VISION_TOKENS.name, 64, {"source": "remote"}) in told
    for name, value, labels in told:
        if name != TTFT.name:
            assert page[(name, *labels.values())] == value


def test_gauges_are_told_again_and_counters_are_not() -> None:
    told: list[tuple[str, float]] = []

    class Sink:
        def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
            told.append((metric.name, value))

    metrics = Metrics(Sink())
    metrics.record(REQUESTS, status="200")
    metrics.record(RUNNING, 3)
    metrics.record(RUNNING, 2)
    told.clear()
    metrics.tell_again()
    assert told == [(RUNNING.name, 2)]
    Metrics().tell_again()
