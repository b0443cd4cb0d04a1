from __future__ import annotations

import pytest

from vlcache_dist.loadtest.counters import (
    Disagreement,
    EndpointDead,
    check,
    differences,
    expected,
    parse,
    pools,
    rise,
)
from vlcache_dist.loadtest.records import Record
from vlcache_dist.metrics import REQUESTS, Metrics


def record(index: int = 0, status: str = "answered", http_status: int = 200, source: str = "local") -> Record:
    image = {"source": source, "vision_tokens": 64, "recomputed_tokens": 4, "bytes_moved": 1000}
    answered = status == "answered"
    return Record(
        index=index,
        tenant=0,
        client="c",
        scheduled_s=0.0,
        sent_s=0.0,
        status=status,  # type: ignore[arg-type]
        http_status=http_status,
        prompt_tokens=70 if answered else 0,
        cached_tokens=60 if answered else 0,
        completion_tokens=2 if answered else 0,
        images=(image,) if answered else (),
    )


def counted(*records: Record) -> dict[str, float]:
    """What the server's own metrics say after these requests."""
    metrics = Metrics()
    for each in records:
        metrics.record(REQUESTS, status=str(each.http_status))
        if each.status == "answered":
            answer = {"images": list(each.images)}
            metrics.finished(each.prompt_tokens, each.cached_tokens, each.completion_tokens, answer)
    return parse(metrics.text().decode())


def test_clients_expect_exactly_what_the_server_counts() -> None:
    records = [record(0), record(1, source="remote"), record(2, "refused", 503)]
    risen = rise({}, counted(*records))
    assert differences(records, risen) == []
    assert expected(records).items() <= risen.items() or differences(records, risen) == []


@pytest.mark.parametrize(
    ("lie", "word"),
    [
        ((record(0), record(1), record(2)), "requests_total"),  # somebody else's request
        ((record(0),), "cached_tokens"),  # one was not counted
        ((record(0), record(1, source="remote")), "source=remote"),  # a hit of another tier
    ],
)
def test_any_difference_is_seen(lie: tuple[Record, ...], word: str) -> None:
    found = differences([record(0), record(1)], rise({}, counted(*lie)))
    assert any(word in line for line in found), found


def test_only_what_rose_counts() -> None:
    before = counted(record(0))
    after = counted(record(0), record(1))
    assert differences([record(1)], rise(before, after)) == []
    assert rise(before, before) == {}


def test_ray_prefixes_and_replicas() -> None:
    page = """# TYPE ray_vlcache_requests_total counter
ray_vlcache_requests_total{status="200",replica="a",Version="2"} 3
ray_vlcache_requests_total{status="200",replica="b",Version="2"} 4
ray_other_total 9
"""
    assert parse(page) == {"vlcache_requests_total{status=200}": 7}


def test_sent_is_answered_and_refused() -> None:
    check(2, [record(0), record(1, "refused", 503)])
    with pytest.raises(Disagreement, match="2 requests were planned, 1 "):
        check(2, [record(0)])
    with pytest.raises(Disagreement, match="2 requests were planned, 2 "):
        check(2, [record(0), record(0)])
    with pytest.raises(Disagreement, match="sent 2, answered 1, refused 0: 1 failed"):
        check(2, [record(0), record(1, "failed", 500)])
    with pytest.raises(EndpointDead):
        check(2, [record(0), record(1, "failed", 0)])


def test_pools_are_summed_by_role() -> None:
    load = {"running": 2, "waiting": 1, "kv_blocks_free": 1, "kv_blocks_total": 4}
    load |= {"store_bytes_used": 5, "store_bytes_total": 10}
    idle = dict.fromkeys(load, 0)
    workers = [{"role": "prefill", "load": load}, {"role": "prefill", "load": load}, {"role": "encoder", "load": idle}]
    encoder, prefill = pools(workers, 1.5)
    assert (prefill.workers, prefill.running, prefill.waiting, prefill.kv, prefill.store) == (2, 4, 2, 0.75, 0.5)
    assert (encoder.kv, encoder.store) == (0.0, 0.0)
