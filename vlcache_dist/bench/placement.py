"""Placement policies on traces, in simulation: ``vlcache-dist bench placement``.

The dispatcher, its policies and its cost model are the ones that the ingress runs, fed with heartbeats that are as old
as real ones. Around them is a discrete-event model of the pools whose times come from measurements of the engine
(``bench ttft``), *not* from the cost model that placement itself uses. What the model leaves out: batching of several
prefills in one pass, decode beside prefill, prefix caches, failures.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlcache_dist import wire
from vlcache_dist.errors import ConfigError
from vlcache_dist.loadtest.analysis import percentile
from vlcache_dist.loadtest.scenario import Scenario
from vlcache_dist.loadtest.trace import Arrival, Trace
from vlcache_dist.prefill_workers.speed import PassSpeed
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.serve.dispatch import Dispatcher
from vlcache_dist.serve.placement import POLICIES, Costs, Demand, SpanDemand
from vlcache_dist.types import Role

REQUESTS = 2000  # of a planned trace


class EngineTimes:
    """Seconds of encoding and prefill by vision tokens, interpolated between the rows of a ``bench ttft`` report.

    A request with c fresh and r reused vision tokens takes warm(r) + (prefill(c) - prefill(0)), where prefill is the
    cold time without the vision tower. Raises ConfigError for a report with fewer than two sizes.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        rows = sorted(report["rows"], key=lambda row: row["vision_tokens"])
        if len(rows) < 2:
            raise ConfigError("the engine's report has one size only; at least two are wanted")
        self._tokens = [row["vision_tokens"] for row in rows]
        self._warm = [row["warm_ms"] / 1e3 for row in rows]
        self._tower = [row["vision_tower_ms"] / 1e3 for row in rows]
        self._prefill = [(row["cold_ms"] - row["vision_tower_ms"]) / 1e3 for row in rows]

    def encode_s(self, tokens: int) -> float:
        return self._at(self._tower, tokens)

    def compute_s(self, fresh: int, reused: int) -> float:
        return self._at(self._warm, reused) + self._at(self._prefill, fresh) - self._at(self._prefill, 0)

    def _at(self, seconds: Sequence[float], tokens: int) -> float:
        """Linear between rows and beyond them, never below a tenth of the first."""
        n = self._tokens
        upper = min(max(int(np.searchsorted(n, tokens)), 1), len(n) - 1)
        slope = (seconds[upper] - seconds[upper - 1]) / (n[upper] - n[upper - 1])
        return max(seconds[upper - 1] + slope * (tokens - n[upper - 1]), seconds[0] / 10)


class Pools(msgspec.Struct, frozen=True):
    """What is simulated. Bytes, seconds, tokens. ``kv_token_bytes``: image KV of one token; ``store_bytes`` of each
    prefill worker; ``link_bytes_per_s`` into each of them."""

    prefills: int = 4
    encoders: int = 4
    kv_token_bytes: int = 57_344
    store_bytes: int = 16 << 30
    link_bytes_per_s: float = 20e9
    link_base_s: float = 0.5e-3
    announce_s: float = 2e-3
    heartbeat_s: float = 0.5
    plan: str = "uniform:2,min=16"
    num_layers: int = 28


@dataclass(slots=True)
class _Request:
    """``waits``: sources that are not there yet; ``records``: pictures that it computes for everybody."""

    arrival: Arrival
    demand: Demand
    counted: ExitStack
    waits: int = 0
    rows: int = 0
    fresh: int = 0
    reused: int = 0
    records: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Worker:
    worker_id: str
    store: OrderedDict[str, int] = field(default_factory=OrderedDict)  # picture -> bytes, the least recently used first
    fetching: dict[str, list[_Request]] = field(default_factory=dict)
    ready: list[_Request] = field(default_factory=list)
    waiting_rows: int = 0
    link_free_s: float = 0.0
    busy_s: float = 0.0
    rows: int = 0
    passes: int = 0
    speed: PassSpeed = field(default_factory=PassSpeed)
    waiting: int = 0
    computing: bool = False


class Simulation:
    """One policy over one trace; ``run`` once. Time is the trace's."""

    def __init__(self, trace: Trace, pools: Pools, times: EngineTimes, policy: str, costs: Costs | None = None) -> None:
        self._trace = trace
        self._pools = pools
        self._times = times
        self._plan = Plan.parse(pools.plan)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._workers = {f"prefill-{n}": _Worker(f"prefill-{n}") for n in range(pools.prefills)}
        self._encoder_free = {f"encoder-{n}": 0.0 for n in range(pools.encoders)}
        self._encoded: dict[str, float] = {}  # picture -> when it was encoded, or will have been
        self._holders: dict[str, set[str]] = {}  # as the directory knows
        self._producer: dict[str, str] = {}
        self._awaited: dict[str, list[tuple[_Worker, _Request]]] = {}
        self._loads = {worker_id: wire.WorkerLoad() for worker_id in self._workers}
        self._dispatch = Dispatcher(self._members, costs or Costs(), POLICIES[policy])
        self._policy = policy
        self._left = len(trace.arrivals)
        self._ttft_ms: list[float] = []
        self._tokens = {"local": 0, "remote": 0, "computed": 0}
        self._moved = 0

    def run(self) -> dict[str, Any]:
        """A row of the report: TTFT in ms, share of vision tokens by source, bytes moved, balance (the busiest worker's
        time over the mean)."""
        for arrival in self._trace.arrivals:
            self._at(arrival.at_s, lambda arrival=arrival: self._arrive(arrival))  # type: ignore[misc]
        self._at(0.0, self._heartbeat)
        while self._events and self._left:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        vision = sum(self._tokens.values())
        busy = [worker.busy_s for worker in self._workers.values()]
        return {
            "trace": self._trace.name,
            "policy": self._policy,
            "requests": len(self._ttft_ms),
            "ttft_mean_ms": round(float(np.mean(self._ttft_ms)), 3),
            **{f"ttft_p{q}_ms": round(percentile(self._ttft_ms, q / 100), 3) for q in (50, 90, 99)},
            **{f"{source}_share": round(n / vision, 4) if vision else 0.0 for source, n in self._tokens.items()},
            "gib_moved": round(self._moved / 2**30, 3),
            "utilization": round(sum(busy) / len(busy) / self._now, 4),
            "balance": round(max(busy) / (sum(busy) / len(busy)), 3),
        }

    # -- the ingress ----------------------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        demand = Demand(
            arrival.text_tokens, tuple(self._span(image.picture, image.tokens) for image in arrival.images), True
        )
        member, choice = self._dispatch.choose_prefill(demand, None, ())
        counted = ExitStack()
        counted.enter_context(self._dispatch.prefilling(choice.worker_id, choice.active_tokens))
        worker = self._workers[member.info.worker_id]
        self._resolve(worker, _Request(arrival, demand, counted))

    def _span(self, picture: str, tokens: int) -> SpanDemand:
        return SpanDemand(
            key=picture.encode(),
            tokens=tokens,
            kv_bytes=tokens * self._pools.kv_token_bytes,
            recompute=self._plan.counts(tokens, self._pools.num_layers)[0],
            holders=frozenset(self._holders.get(picture, ())),
            encoded=self._encoded.get(picture, float("inf")) <= self._now,
            producer=self._producer.get(picture),
        )

    def _members(self) -> list[wire.Member]:
        return [
            wire.Member(wire.WorkerInfo(worker_id, worker_id, Role.PREFILL, worker_id), load, 0.0)
            for worker_id, load in self._loads.items()
        ]

    def _heartbeat(self) -> None:
        peers = dict.fromkeys(self._workers, self._pools.link_bytes_per_s)
        for worker_id, worker in self._workers.items():
            worker.speed.observe(worker.passes, worker.rows, worker.busy_s)
            self._loads[worker_id] = wire.WorkerLoad(
                waiting=worker.waiting,
                waiting_tokens=worker.waiting_rows,
                pass_s=worker.speed.pass_s,
                token_s=worker.speed.token_s,
                read_bytes_per_s=peers,
            )
        self._at(self._now + self._pools.heartbeat_s, self._heartbeat)

    # -- a prefill worker -----------------------------------------------------------------------------------------

    def _resolve(self, worker: _Worker, request: _Request) -> None:
        """Own store, else a holder, else claim and compute, else wait for whoever does; as ``SpanResolver``."""
        seen: set[str] = set()
        for image, span in zip(request.arrival.images, request.demand.spans, strict=True):
            if image.picture in seen:
                request.reused += image.tokens
                request.rows += span.recompute
                continue
            seen.add(image.picture)
            if image.picture in worker.store:
                worker.store.move_to_end(image.picture)
                self._hit(request, span, "local")
            elif self._holds(image.picture):
                self._fetch(worker, request, span, image.picture)
            elif image.picture in self._producer:
                request.waits += 1
                self._awaited.setdefault(image.picture, []).append((worker, request))
            else:
                self._producer[image.picture] = worker.worker_id
                self._compute(request, span, image.picture)
                request.waits += 1
                self._at(self._encode(image.picture, image.tokens), lambda: self._arrived(worker, request))
        request.rows += request.arrival.text_tokens
        worker.waiting_rows += request.rows
        worker.waiting += 1
        if not request.waits:
            self._is_ready(worker, request)

    def _holds(self, picture: str) -> bool:
        return any(picture in worker.store for worker in self._workers.values())

    def _hit(self, request: _Request, span: SpanDemand, source: str) -> None:
        request.reused += span.tokens
        request.rows += span.recompute
        self._tokens[source] += span.tokens

    def _compute(self, request: _Request, span: SpanDemand, picture: str) -> None:
        request.fresh += span.tokens
        request.rows += span.tokens
        request.records.append(picture)
        self._tokens["computed"] += span.tokens

    def _fetch(self, worker: _Worker, request: _Request, span: SpanDemand, picture: str) -> None:
        self._hit(request, span, "remote")
        request.waits += 1
        if picture in worker.fetching:
            worker.fetching[picture].append(request)
            return
        worker.fetching[picture] = [request]
        self._moved += span.kv_bytes
        begins = max(self._now, worker.link_free_s)
        worker.link_free_s = begins + self._pools.link_base_s + span.kv_bytes / self._pools.link_bytes_per_s

        def done() -> None:
            self._store(worker, picture, span.kv_bytes)
            for waiting in worker.fetching.pop(picture):
                self._arrived(worker, waiting)

        self._at(worker.link_free_s, done)

    def _encode(self, picture: str, tokens: int) -> float:
        """When the encoder will have done it."""
        if picture not in self._encoded:
            encoder = min(self._encoder_free, key=lambda name: hashlib.blake2b(f"{picture} {name}".encode()).digest())
            self._encoder_free[encoder] = max(self._now, self._encoder_free[encoder]) + self._times.encode_s(tokens)
            self._encoded[picture] = self._encoder_free[encoder]
        return max(self._now, self._encoded[picture])

    def _arrived(self, worker: _Worker, request: _Request) -> None:
        request.waits -= 1
        if not request.waits:
            self._is_ready(worker, request)

    def _is_ready(self, worker: _Worker, request: _Request) -> None:
        worker.ready.append(request)
        self._next(worker)

    def _next(self, worker: _Worker) -> None:
        if worker.computing or not worker.ready:
            return
        worker.computing = True
        request = worker.ready.pop(0)
        took = self._times.compute_s(request.fresh, request.reused)
        worker.busy_s += took
        worker.rows += request.rows
        worker.passes += 1
        self._at(self._now + took, lambda: self._done(worker, request))

    def _done(self, worker: _Worker, request: _Request) -> None:
        worker.computing = False
        worker.waiting_rows -= request.rows
        worker.waiting -= 1
        request.counted.close()
        self._left -= 1
        self._ttft_ms.append((self._now - request.arrival.at_s) * 1e3)
        sizes = {span.key.decode(): span for span in request.demand.spans}
        for picture in request.records:
            self._store(worker, picture, sizes[picture].kv_bytes)
        self._next(worker)

    def _store(self, worker: _Worker, picture: str, size: int) -> None:
        worker.store[picture] = size
        worker.store.move_to_end(picture)
        while sum(worker.store.values()) > self._pools.store_bytes and len(worker.store) > 1:
            gone, _ = worker.store.popitem(last=False)
            self._holders.get(gone, set()).discard(worker.worker_id)
        self._at(self._now + self._pools.announce_s, lambda: self._announced(worker, picture))

    def _announced(self, worker: _Worker, picture: str) -> None:
        if picture in worker.store:
            self._holders.setdefault(picture, set()).add(worker.worker_id)
        if self._producer.get(picture) == worker.worker_id:
            del self._producer[picture]
        for waiting, request in self._awaited.pop(picture, []):
            span = next(s for s in request.demand.spans if s.key.decode() == picture)
            before = request.rows
            if picture in waiting.store:
                self._hit(request, span, "local")
            else:
                self._fetch(waiting, request, span, picture)
            waiting.waiting_rows += request.rows - before
            self._arrived(waiting, request)

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))


def read_engine(path: Path) -> dict[str, Any]:
    """A report of ``bench ttft``. Raises ConfigError."""
    try:
        report = msgspec.json.decode(path.read_bytes())
        EngineTimes(report)
        return {name: report[name] for name in ("machine", "shape", "plan", "rows")}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no report of `bench ttft`: {type(error).__name__} {error}") from error


def workloads(pools: Pools, times: EngineTimes) -> list[Trace]:
    """Planned traces of 7B-sized pictures at a moderate and a high load. ``times`` sets the rates: about 30 and 70 % of
    what the prefill workers could do if placement were free."""
    pages, screens = ((32, 32), (64, 64)), ((32, 44),)
    found = []
    for share, each in (
        (0.8, Scenario("document-qa", images=1, sizes=pages)),
        (0.95, Scenario("hot-image", images=1, sizes=pages, zipf=2.0)),
        (0.8, Scenario("multi-image", images=6, sizes=((32, 32),))),
        (0.75, Scenario("agent-window", "window", images=4, sessions=30, sizes=screens)),
        (0.9, Scenario("chat", "chat", images=2, sessions=64, context_change=0.0, sizes=pages)),
    ):
        requests = Trace.planned(each, 1.0, share, REQUESTS, 1)
        mean_s = _mean_compute_s(requests, times)
        for load in (0.3, 0.7):
            found.append(
                msgspec.structs.replace(
                    requests.scaled(load * pools.prefills / mean_s), name=f"{each.name}, {load:.0%} load"
                )
            )
    return found


def _mean_compute_s(trace: Trace, times: EngineTimes) -> float:
    """Seconds of prefill per request if every picture is computed once."""
    seen: set[str] = set()
    total = 0.0
    for arrival in trace.arrivals:
        fresh = sum(image.tokens for image in arrival.images if image.picture not in seen)
        total += times.compute_s(fresh, sum(image.tokens for image in arrival.images) - fresh)
        seen |= {image.picture for image in arrival.images}
    return total / len(trace.arrivals)


def run(traces: Sequence[Trace] | None, pools: Pools, engine: dict[str, Any]) -> dict[str, Any]:
    """Every policy over every trace; None: over ``workloads``. ``engine``: a report of ``bench ttft``. Raises
    ConfigError."""
    times = EngineTimes(engine)
    played = workloads(pools, times) if traces is None else traces
    rows = [Simulation(trace, pools, times, policy).run() for trace in played for policy in POLICIES]
    return {
        "machine": "simulation",
        "engine": {"machine": engine["machine"], "shape": engine["shape"], "plan": engine["plan"]},
        "pools": msgspec.to_builtins(pools),
        "traces": {trace.name: {"source": trace.source, "requests": len(trace.arrivals)} for trace in played},
        "rows": rows,
    }
