"""The server's own numbers: Prometheus counters and the workers' status, and whether they agree with the clients'."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vlcache_dist.errors import VLCacheError
from vlcache_dist.loadtest.client import Target
from vlcache_dist.loadtest.records import PoolSample, Record

PREFIX = "vlcache_"


class EndpointDead(VLCacheError):
    """Nobody answers at the endpoint, or what answers is not this server."""


class Disagreement(VLCacheError):
    """The server's counters and the clients' records cannot both be right."""


def get(target: Target, path: str, timeout_s: float = 10.0) -> httpx.Response:
    """Raises EndpointDead."""
    url = path if path.startswith("http") else f"{target.url}{path}"
    try:
        reply = httpx.get(url, timeout=timeout_s, headers=target.headers())
        reply.raise_for_status()
    except httpx.HTTPError as error:
        raise EndpointDead(f"{url} does not answer as it should: {error}") from error
    return reply


def parse(text: str) -> dict[str, float]:
    """Counters of the exposition format as ``name{label=value}``, our own only, labels that Ray adds left out and
    replicas summed; Ray's prefix ``ray_`` is taken off."""
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("ray_")
            if not name.startswith(PREFIX) or not name.endswith("_total"):
                continue
            labels = [f"{key}={sample.labels[key]}" for key in ("status", "source") if key in sample.labels]
            found[name + (f"{{{','.join(labels)}}}" if labels else "")] += sample.value
    return dict(found)


def scrape(target: Target, urls: Sequence[str]) -> dict[str, float]:
    """Counters summed over all exposition pages. Raises EndpointDead."""
    total: dict[str, float] = defaultdict(float)
    for url in urls:
        for name, value in parse(get(target, url).text).items():
            total[name] += value
    return dict(total)


def rise(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What counters rose by; those that did not are left out."""
    return {name: value - before.get(name, 0.0) for name, value in sorted(after.items()) if value != before.get(name)}


def expected(records: Sequence[Record]) -> dict[str, float]:
    """What the server's counters must have risen by if the clients are right."""
    total: dict[str, float] = defaultdict(float)
    for record in records:
        if record.http_status:
            total[f"vlcache_requests_total{{status={record.http_status}}}"] += 1
        if record.status != "answered":
            continue
        total["vlcache_prompt_tokens_total"] += record.prompt_tokens
        total["vlcache_cached_tokens_total"] += record.cached_tokens
        total["vlcache_completion_tokens_total"] += record.completion_tokens
        for image in record.images:
            total[f"vlcache_vision_tokens_total{{source={image['source']}}}"] += image["vision_tokens"]
            total["vlcache_recomputed_vision_tokens_total"] += image["recomputed_tokens"]
            total["vlcache_image_bytes_moved_total"] += image["bytes_moved"]
    return {name: value for name, value in total.items() if value}


def differences(records: Sequence[Record], risen: dict[str, float]) -> list[str]:
    """Counters that differ from the clients' sums, in words; empty: they agree. Counters that the clients cannot know
    are not compared."""
    wanted = expected(records)
    known = {name.split("{")[0] for name in wanted} | {
        "vlcache_requests_total",
        "vlcache_prompt_tokens_total",
        "vlcache_cached_tokens_total",
        "vlcache_completion_tokens_total",
        "vlcache_vision_tokens_total",
        "vlcache_recomputed_vision_tokens_total",
        "vlcache_image_bytes_moved_total",
    }
    names = sorted(set(wanted) | {name for name in risen if name.split("{")[0] in known})
    return [
        f"{name}: the server counted {risen.get(name, 0.0):.0f}, the clients {wanted.get(name, 0.0):.0f}"
        for name in names
        if risen.get(name, 0.0) != wanted.get(name, 0.0)
    ]


def check(planned: int, records: Sequence[Record]) -> None:
    """Raises Disagreement unless every planned request was answered or refused, once, and EndpointDead if the
    endpoint went away."""
    if len({record.index for record in records}) != len(records) or len(records) != planned:
        raise Disagreement(f"{planned} requests were planned, {len(records)} are recorded")
    failed = [record for record in records if record.status == "failed"]
    if not failed:
        return
    first = min(failed, key=lambda record: record.scheduled_s)
    answered = sum(record.status == "answered" for record in records)
    refused = sum(record.status == "refused" for record in records)
    what = (
        f"sent {planned}, answered {answered}, refused {refused}: {len(failed)} failed, the first with {first.error!r}"
    )
    if all(not record.http_status for record in failed):
        raise EndpointDead(what)
    raise Disagreement(what)


def settle(
    target: Target, urls: Sequence[str], before: dict[str, float], records: Sequence[Record], patience_s: float
) -> dict[str, float]:
    """What the counters rose by, once they agree with the clients: exposition may lag behind (Ray's does by seconds).
    Raises Disagreement after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while True:
        risen = rise(before, scrape(target, urls))
        differing = differences(records, risen)
        if not differing:
            return risen
        if time.monotonic() > deadline:
            raise Disagreement(
                f"counters and clients disagree ({'; '.join(differing)}); is somebody else using the endpoint?"
            )
        time.sleep(0.2)


class PoolSampler:
    """Asks for the workers' status every ``period_s`` in a thread of its own, while it is entered."""

    def __init__(self, target: Target, period_s: float) -> None:
        self._target = target
        self._period_s = period_s
        self._over = threading.Event()
        self._started = time.time()
        self._thread = threading.Thread(target=self._run, name="pool-sampler", daemon=True)
        self.samples: list[PoolSample] = []

    def starting_at(self, start: float) -> PoolSampler:
        """``start``: wall-clock seconds that samples count from."""
        self._started = start
        return self

    def __enter__(self) -> PoolSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            try:
                workers = get(self._target, "/status", timeout_s=5.0).json()["workers"]
            except EndpointDead:
                continue  # the clients say so, louder
            self.samples += pools(workers, round(time.time() - self._started, 2))


def pools(workers: Sequence[dict[str, Any]], at_s: float) -> list[PoolSample]:
    """Status of workers, summed by role."""
    by_role: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for worker in workers:
        by_role[worker["role"]].append(worker["load"])

    def used(loads: Sequence[dict[str, Any]], part: str, whole: str) -> float:
        total = sum(load[whole] for load in loads)
        return round(sum(load[part] for load in loads) / total, 4) if total else 0.0

    return [
        PoolSample(
            at_s=at_s,
            role=role,
            workers=len(loads),
            running=sum(load["running"] for load in loads),
            waiting=sum(load["waiting"] for load in loads),
            kv=round(1 - used(loads, "kv_blocks_free", "kv_blocks_total"), 4)
            if any(load["kv_blocks_total"] for load in loads)
            else 0.0,
            store=used(loads, "store_bytes_used", "store_bytes_total"),
        )
        for role, loads in sorted(by_role.items())
    ]
