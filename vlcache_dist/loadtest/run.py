"""One load test: points of scenario, rate and reuse share, each beside ``reuse=off``, against one deployment."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from importlib.metadata import version

import msgspec

from vlcache_dist.errors import ConfigError, VLCacheError
from vlcache_dist.loadtest import arrivals, counters, dataset, scenario
from vlcache_dist.loadtest.actor import drive_on_nodes, is_joined, places
from vlcache_dist.loadtest.analysis import summarize
from vlcache_dist.loadtest.client import Job, Target, drive
from vlcache_dist.loadtest.dataset import Request, render
from vlcache_dist.loadtest.records import Measurement, Objective, Point, Record, Run
from vlcache_dist.loadtest.scenario import Scenario
from vlcache_dist.serve.endpoint import base_of

LEAD_S = 1.5  #: from the decision to start until the first request: clients build their bodies in it
SAMPLE_S = 0.5
WARM_UP = 4


class OutOfTime(VLCacheError):
    """The run's own time limit came before its last point."""


class Options(msgspec.Struct, frozen=True):
    """What is measured. Times in seconds.

    A point has ``rate * duration_s`` requests, at most ``max_requests``, in each of its two arms; a request without an
    answer after ``timeout_s`` has failed; after ``limit_s`` no further point is begun.
    """

    scenarios: tuple[Scenario, ...]
    rates: tuple[float, ...]
    shares: tuple[float, ...]
    objective: Objective
    duration_s: float = 30.0
    max_requests: int = 1000
    timeout_s: float = 60.0
    limit_s: float = 3600.0
    seed: int = 0
    reuse: str = "approx"
    clients: int = 1
    process: arrivals.Process = "poisson"
    metrics_urls: tuple[str, ...] = ("/metrics",)
    settle_s: float = 15.0

    def count(self, rate: float) -> int:
        """Requests of one arm."""
        return max(1, min(round(rate * self.duration_s), self.max_requests))

    def expected_s(self) -> float:
        """Seconds that all points take if nothing queues up."""
        return len(self.scenarios) * len(self.shares) * 2 * sum(self.count(rate) / rate + LEAD_S for rate in self.rates)


def find(url: str, keys: Sequence[str] = ()) -> Target:
    """The deployment at a URL. Raises EndpointDead."""
    target = Target(base_of(url), "", tuple(keys))
    listed = counters.get(target, "/v1/models").json()
    try:
        model = listed["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        raise counters.EndpointDead(f"{url}/v1/models lists no model") from None
    return msgspec.structs.replace(target, model=model)


def measure(
    target: Target,
    options: Options,
    tell: Callable[[str, int, int], None],
    keep: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Measure all points. ``tell``: what is under way, requests done, requests of it. ``keep`` is called with all
    points so far as soon as one is measured: whatever ends the run later does not take them along. Raises
    EndpointDead, Disagreement, OutOfTime, ConfigError."""
    if options.reuse == "off":
        raise ConfigError("reuse=off is always measured; choose what to compare it with: approx or exact")
    began = time.monotonic()
    run = _nothing_yet(target, options)
    _warm_up(target, options, tell)
    number = 0
    for each in options.scenarios:
        for rate in options.rates:
            for share in options.shares:
                number += 1
                if time.monotonic() - began > options.limit_s:
                    raise OutOfTime(
                        f"{options.limit_s:.0f} s are over before point {number} of {run.planned}; measure less, or "
                        "allow more"
                    )
                point = _point(target, options, each, rate, share, options.seed + number, tell)
                run = msgspec.structs.replace(run, points=[*run.points, point])
                keep(run)
    return run


def _nothing_yet(target: Target, options: Options) -> Run:
    """What is known of a run before its first point."""
    workers: dict[str, int] = {}
    for worker in counters.get(target, "/status").json()["workers"]:
        workers[worker["role"]] = workers.get(worker["role"], 0) + 1
    return Run(
        model=target.model,
        endpoint=target.url,
        clients=options.clients,
        objective=options.objective,
        scenarios=list(options.scenarios),
        workers=workers,
        versions={name: version(name) for name in ("torch", "transformers", "ray")},
        host=f"{os.cpu_count()} cores, {platform.machine()}",
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        points=[],
        planned=len(options.scenarios) * len(options.rates) * len(options.shares),
    )


def _point(
    target: Target,
    options: Options,
    each: Scenario,
    rate: float,
    share: float,
    seed: int,
    tell: Callable[[str, int, int], None],
) -> Point:
    """Both arms of a point. Its pictures are its own, so that caches know nothing of them; without reuse first, because
    that leaves nothing behind."""
    count = options.count(rate)
    planned = scenario.plan(each, share, count, seed)
    dataset.prepare(planned)
    requests = render(each, planned, seed)
    times = arrivals.schedule(count, rate, seed, options.process)
    arms = []
    for reuse in ("off", options.reuse):
        name = f"{each.name}, {rate:g}/s, {share:.0%} repeated, reuse={reuse}"
        arms.append(_arm(target, options, reuse, requests, times, functools.partial(_tell_done, tell, name, count)))
    return Point(each.name, rate, share, round(scenario.share_of(planned), 4), seed, arms)


def _tell_done(tell: Callable[[str, int, int], None], name: str, total: int, done: int) -> None:
    tell(name, done, total)


def _arm(
    target: Target,
    options: Options,
    reuse: str,
    requests: Sequence[Request],
    times: Sequence[float],
    done: Callable[[int], None],
) -> Measurement:
    before = counters.scrape(target, options.metrics_urls)
    start = time.time() + LEAD_S
    jobs = _jobs(target, options, reuse, requests, times, start)
    records: list[Record] = []
    done(0)
    with counters.PoolSampler(target, SAMPLE_S).starting_at(start) as sampler, closing(_drive(jobs)) as batches:
        for batch in batches:
            records += batch
            done(len(records))
    records.sort(key=lambda record: record.index)
    counters.check(len(requests), records)
    risen = counters.settle(target, options.metrics_urls, before, records, options.settle_s)
    return Measurement(reuse, summarize(records, options.objective), risen, sampler.samples, records)


def _jobs(
    target: Target, options: Options, reuse: str, requests: Sequence[Request], times: Sequence[float], start: float
) -> list[Job]:
    """Requests dealt out to the clients in turn."""
    return [
        Job(
            client=f"client-{number}",
            target=target,
            reuse=reuse,
            start=start,
            arrivals=tuple(times[number :: options.clients]),
            requests=tuple(requests[number :: options.clients]),
            timeout_s=options.timeout_s,
        )
        for number in range(options.clients)
    ]


def _drive(jobs: Sequence[Job]) -> Generator[list[Record]]:
    """In Ray tasks where there is a cluster, else in this process."""
    if is_joined():
        yield from drive_on_nodes(jobs, places(jobs[0].target.url))
        return
    if len(jobs) > 1:
        raise ConfigError("several clients need a Ray cluster to run on: name one with --address")
    yield from drive(jobs[0])


def _warm_up(target: Target, options: Options, tell: Callable[[str, int, int], None]) -> None:
    """A few requests of every client on pictures of their own, so that no point pays for first connections, nor for
    the start of the clients' processes."""
    each = options.scenarios[0]
    count = WARM_UP * options.clients
    requests = render(each, scenario.plan(each, 0.5, count, options.seed), options.seed)
    jobs = _jobs(target, options, options.reuse, requests, [number / count for number in range(count)], time.time())
    with closing(_drive(jobs)) as batches:
        records = [record for batch in batches for record in batch]
    tell("warm-up", len(records), count)
    counters.check(count, records)
