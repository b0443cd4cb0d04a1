"""The encoder's batcher."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_dist.encoder_workers.scheduler import EncodeJob, EncodeScheduler


def job(number: int, patches: int) -> EncodeJob:
    return EncodeJob(number.to_bytes(32, "little"), patches, patches // 4)


def test_batches_are_packed_in_order_up_to_the_limit() -> None:
    scheduler = EncodeScheduler(100)
    jobs = [job(i, patches) for i, patches in enumerate((60, 40, 1, 100, 30))]
    assert all(scheduler.add(j) for j in jobs)
    assert [scheduler.next_batch() for _ in range(4)] == [jobs[:2], jobs[2:3], jobs[3:4], jobs[4:]]
    assert scheduler.next_batch() == [] and len(scheduler) == 0


def test_a_picture_above_the_limit_runs_alone() -> None:
    scheduler = EncodeScheduler(10)
    scheduler.add(job(0, 4))
    scheduler.add(job(1, 400))
    scheduler.add(job(2, 4))
    assert [len(scheduler.next_batch()) for _ in range(3)] == [1, 1, 1]


def test_a_key_waits_once_and_can_be_cancelled() -> None:
    scheduler = EncodeScheduler(10)
    assert scheduler.add(job(0, 4)) and not scheduler.add(job(0, 4))
    assert scheduler.waiting_tokens == 1
    assert scheduler.cancel(job(0, 4).key) and not scheduler.cancel(job(0, 4).key)
    assert scheduler.next_batch() == []


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_patches"):
        EncodeScheduler(0)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_every_job_runs_exactly_once_in_order(sizes: list[int], limit: int) -> None:
    scheduler = EncodeScheduler(limit)
    jobs = [job(i, size) for i, size in enumerate(sizes)]
    for each in jobs:
        scheduler.add(each)
    ran = []
    while batch := scheduler.next_batch():
        assert len(batch) == 1 or sum(j.patches for j in batch) <= limit
        ran += batch
    assert ran == jobs
