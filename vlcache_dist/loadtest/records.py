"""What a load test knows of one request, one measurement, one point, one run. Written to JSON as they are."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vlcache_dist.loadtest.scenario import Scenario

Status = Literal["answered", "refused", "failed"]


class Record(msgspec.Struct, frozen=True):
    """One request as its client saw it. Times in seconds since the measurement's start; ``ttft_ms`` counts from the
    *scheduled* time, so that a request that had to wait for its client is not made to look fast. ``itl_ms``: gaps
    between pieces of the answer. ``images``: the provenance that the server gave. ``refused``: HTTP 429 or 503."""

    index: int
    tenant: int
    client: str
    scheduled_s: float
    sent_s: float
    status: Status
    http_status: int = 0
    error: str = ""
    ttft_ms: float = 0.0
    itl_ms: tuple[float, ...] = ()
    total_ms: float = 0.0
    answer: str = ""
    expected: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    handoff_bytes: int = 0
    images: tuple[dict[str, Any], ...] = ()

    @property
    def itl_mean_ms(self) -> float:
        return sum(self.itl_ms) / len(self.itl_ms) if self.itl_ms else 0.0


class PoolSample(msgspec.Struct, frozen=True):
    """A pool at ``at_s`` seconds of a measurement: sums over its workers. ``kv`` and ``store`` are shares in use."""

    at_s: float
    role: str
    workers: int
    running: int
    waiting: int
    kv: float
    store: float


class Objective(msgspec.Struct, frozen=True):
    """What a request must keep to count as good: time to first token, and the mean gap between tokens."""

    ttft_ms: float
    itl_ms: float


class Summary(msgspec.Struct, frozen=True):
    """Figures of one measurement. Percentiles in ms; ``goodput``: requests per second within the objective;
    ``tokens``: vision tokens by source; shares are of vision tokens; ``right``: share of answers that are the known
    one; ``late_p99_ms``: how late the clients sent."""

    sent: int
    answered: int
    refused: int
    failed: int
    duration_s: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    goodput: float
    right: float
    tokens: dict[str, int]
    hit_share: float
    recompute_share: float
    cached_share: float
    bytes_fetched: int
    bytes_handed_over: int
    late_p99_ms: float


class Measurement(msgspec.Struct, frozen=True):
    """One arm of a point: the same requests at the same times with one ``reuse`` mode. ``counters``: what the server's
    counters rose by, ``name{label=value}``."""

    reuse: str
    summary: Summary
    counters: dict[str, float]
    pools: list[PoolSample]
    records: list[Record]


class Point(msgspec.Struct, frozen=True):
    """A scenario at a rate and a reuse share. ``share`` was asked for, ``repeated`` is what the plan has."""

    scenario: str
    rate: float
    share: float
    repeated: float
    seed: int
    arms: list[Measurement]


class Run(msgspec.Struct, frozen=True):
    """Everything that the report shows. ``planned``: the points that were to be measured; a run that ended early has
    fewer; 0: not known (files of earlier versions)."""

    model: str
    endpoint: str
    clients: int
    objective: Objective
    scenarios: list[Scenario]
    workers: dict[str, int]
    versions: dict[str, str]
    host: str
    started: str
    points: list[Point]
    planned: int = 0

    @property
    def missing(self) -> int:
        """Points that were not measured."""
        return max(0, self.planned - len(self.points))
