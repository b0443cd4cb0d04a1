"""Every metric that the system exports, declared in one place.

``INGRESS`` and ``WORKER`` are the declarations. Ray's Prometheus endpoint on each node exports all of them, with the
prefix ``ray_``; the ingress's own ``/metrics`` shows those of the ingress without a prefix. Dashboards and alerts may
name nothing else (``deploy/monitoring``).

A ``Metrics`` owns its registry, so that two servers in one process (tests) do not share numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Unit = Literal["count", "tokens", "bytes", "seconds", "blocks"]
RAY_PREFIX = "ray_"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_WORKER = ("worker", "role")


@dataclass(frozen=True, slots=True)
class Metric:
    """One declaration. Counters' names end in ``_total``; only counters' do."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    unit: Unit = "count"
    labels: tuple[str, ...] = ()

    @property
    def ray_name(self) -> str:
        """As Ray's endpoint spells it."""
        return RAY_PREFIX + self.name


REQUESTS = Metric("vlcache_requests_total", "counter", "Finished requests by HTTP status", labels=("status",))
RUNNING = Metric("vlcache_requests_running", "gauge", "Requests under way")
TTFT = Metric(
    "vlcache_time_to_first_token_seconds", "histogram", "From complete body to first event of the answer", "seconds"
)
PROMPT_TOKENS = Metric("vlcache_prompt_tokens_total", "counter", "Prompt tokens", "tokens")
CACHED_TOKENS = Metric(
    "vlcache_cached_tokens_total", "counter", "Prompt tokens that were not computed in full", "tokens"
)
COMPLETION_TOKENS = Metric("vlcache_completion_tokens_total", "counter", "Answer tokens", "tokens")
VISION_TOKENS = Metric(
    "vlcache_vision_tokens_total", "counter", "Vision tokens by source of their KV", "tokens", ("source",)
)
RECOMPUTED_TOKENS = Metric(
    "vlcache_recomputed_vision_tokens_total", "counter", "Vision tokens recomputed on a hit", "tokens"
)
BYTES_MOVED = Metric("vlcache_image_bytes_moved_total", "counter", "Bytes of image KV moved between workers", "bytes")
INGRESS: tuple[Metric, ...] = (
    REQUESTS,
    RUNNING,
    TTFT,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    COMPLETION_TOKENS,
    VISION_TOKENS,
    RECOMPUTED_TOKENS,
    BYTES_MOVED,
)


def _gauge(name: str, help: str, unit: Unit = "count", *labels: str) -> Metric:
    return Metric(f"vlcache_worker_{name}", "gauge", help, unit, _WORKER + labels)


def _counter(name: str, help: str, unit: Unit = "count", *labels: str) -> Metric:
    return Metric(f"vlcache_worker_{name}_total", "counter", help, unit, _WORKER + labels)


HEALTHY = _gauge("healthy", "1 if the worker would pass a health check")
DRAINING = _gauge("draining", "1 if the worker takes no new requests")
SEQUENCES_RUNNING = _gauge("running", "Sequences (encoder: pictures) being computed")
SEQUENCES_WAITING = _gauge("waiting", "Sequences (encoder: pictures) that wait")
SEQUENCES_PARKED = _gauge("parked", "Prefilled sequences that wait for a decode worker")
WAITING_TOKENS = _gauge("waiting_tokens", "Active tokens not yet computed", "tokens")
PASS_SECONDS = _gauge("pass_seconds", "Measured time of a forward pass besides its tokens, recent", "seconds")
TOKEN_SECONDS = _gauge("token_seconds", "Measured time of one active token, recent", "seconds")
KV_BLOCKS = _gauge("kv_blocks", "KV blocks in all", "blocks")
KV_BLOCKS_FREE = _gauge("kv_blocks_free", "KV blocks that are free", "blocks")
STORE_BYTES = _gauge("store_bytes", "Size of the object store's arena", "bytes")
STORE_BYTES_USED = _gauge("store_bytes_used", "Bytes of the store that are not free", "bytes")
STORE_BYTES_QUARANTINED = _gauge("store_bytes_quarantined", "Bytes that an unfinished READ may still write", "bytes")
STORE_OBJECTS = _gauge("store_objects", "Committed objects: image KV and encoder output")
STORE_LEASES = _gauge("store_leases", "Leases that readers hold")
EVICTIONS = _counter("store_evictions", "Objects evicted")
READS = _counter("reads", "READs from other workers")
READ_BYTES = _counter("read_bytes", "Bytes read from other workers", "bytes")
READ_FAILURES = _counter("read_failures", "READs that failed, by error", "count", "error")
ENCODED_ITEMS = _counter("encoded_items", "Pictures and videos encoded")
ENCODED_TOKENS = _counter("encoded_tokens", "Vision tokens encoded", "tokens")
ENGINE_STEPS = _counter("engine_steps", "Forward passes of the language model")
SEQUENCES = _counter("sequences", "Sequences that left the engine, by how", "count", "outcome")
ENGINE_PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens of admitted sequences", "tokens")
GENERATED_TOKENS = _counter("generated_tokens", "Tokens generated", "tokens")
PREFIX_HIT_TOKENS = _counter("prefix_hit_tokens", "Prompt tokens found in a prefix cache", "tokens", "cache")
SCATTERED_TOKENS = _counter("scattered_tokens", "Vision tokens whose KV came from image objects", "tokens")
SPANS_RECORDED = _counter("spans_recorded", "Images whose KV was recorded")
SPANS_REUSED = _counter("spans_reused", "Images whose KV was reused")
SPANS_WATCHED = _counter("spans_watched", "Reused images whose canary was read")
SPANS_ESCALATED = _counter("spans_escalated", "Reused images that were computed in full after all")
GUARD_LEVEL = _gauge("guard_level", "0 normal, 1 tightened, 2 strengthened, 3 reuse is off", "count", "format")
DRIFT_KL = _gauge("drift_kl", "Mean KL of first tokens against full runs, nats", "count", "format")
DRIFT_AGREEMENT = _gauge("drift_agreement", "Share of first tokens that agree with full runs", "count", "format")
SHADOW_RUNS = _counter("shadow_runs", "Approximate requests compared with full runs", "count", "format")
MISSED_ALARMS = _counter("missed_alarms", "Compared requests that were harmed without an alarm", "count", "format")
GUARD_TRIPS = _counter("guard_trips", "Times the guard of a worker became more careful", "count", "format")
SHADOW_SECONDS = _counter("shadow_seconds", "Engine time of full runs for comparison", "seconds")
HANDOFF_BYTES = _counter("handoff_bytes", "Bytes that decode workers read to take sequences over", "bytes")
WORKER: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric) and value.labels[:2] == _WORKER
)
DECLARED: tuple[Metric, ...] = INGRESS + WORKER

Sample = tuple[Metric, Mapping[str, str], float]


class Sink(Protocol):
    """Where numbers go besides the own registry."""

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Counters rise by ``value``, gauges are set to it, histograms observe it."""
        ...


class Metrics:
    """The ingress's numbers: in a registry of their own, and in ``sink`` where there is one."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink
        self._registry = CollectorRegistry()
        self._instruments = {metric.name: _instrument(metric, self._registry) for metric in INGRESS}
        self._gauges: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}

    def record(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """As ``Sink.record``."""
        instrument = self._instruments[metric.name]
        child: Any = instrument.labels(**labels) if labels else instrument
        if metric.kind == "counter":
            child.inc(value)
        elif metric.kind == "gauge":
            child.set(value)
            self._gauges[metric, tuple(labels.items())] = value
        else:
            child.observe(value)
        if self._sink is not None:
            self._sink.record(metric, value, labels)

    def tell_again(self) -> None:
        """Tell the sink of every gauge once more: Ray forgets one that nobody sets for a while."""
        if self._sink is not None:
            for (metric, labels), value in self._gauges.items():
                self._sink.record(metric, value, dict(labels))

    def finished(self, prompt: int, cached: int, completion: int, vlcache: dict[str, Any]) -> None:
        """Count an answered request; ``vlcache`` is its response extension."""
        self.record(PROMPT_TOKENS, prompt)
        self.record(CACHED_TOKENS, cached)
        self.record(COMPLETION_TOKENS, completion)
        for image in vlcache.get("images", ()):
            self.record(VISION_TOKENS, image["vision_tokens"], source=image["source"])
            self.record(RECOMPUTED_TOKENS, image["recomputed_tokens"])
            self.record(BYTES_MOVED, image["bytes_moved"])

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)


def _instrument(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind == "counter":
        return Counter(metric.name, metric.help, metric.labels, registry=registry)
    if metric.kind == "gauge":
        return Gauge(metric.name, metric.help, metric.labels, registry=registry)
    return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=_SECONDS)


def buckets(metric: Metric) -> tuple[float, ...]:
    """Upper bounds of a histogram's buckets, in its unit."""
    assert metric.kind == "histogram"
    return _SECONDS


class WorkerSamples:
    """What a worker says of itself (``wire.StatusReply``, ``wire.WorkerLoad`` as mappings) as samples for a ``Sink``:
    counters, which it counts since its start, become what they rose by since the last call."""

    def __init__(self, name: str, role: str) -> None:
        self._labels = {"worker": name, "role": role}
        self._before: dict[tuple[str, tuple[str, ...]], float] = {}

    def of(self, status: Mapping[str, Any], load: Mapping[str, Any]) -> Iterator[Sample]:
        """Only what this kind of worker has."""
        for metric, value, more in _figures(status, load):
            labels = {**self._labels, **more}
            if metric.kind == "counter":
                key = (metric.name, tuple(more.values()))
                value, self._before[key] = value - self._before.get(key, 0.0), value
                if not value:
                    continue
            yield metric, labels, float(value)


_DRIFT = (
    (GUARD_LEVEL, "level_number"),
    (DRIFT_KL, "kl"),
    (DRIFT_AGREEMENT, "agreement"),
)
_OWN_DRIFT = (  # sums over workers: what each has seen itself
    (SHADOW_RUNS, "shadows"),
    (MISSED_ALARMS, "missed_alarms"),
    (GUARD_TRIPS, "rises"),
)


def _figures(status: Mapping[str, Any], load: Mapping[str, Any]) -> Iterator[tuple[Metric, float, dict[str, str]]]:
    store, itemsize, transfers = status["store"], status["store_itemsize"], status["transfers"]
    plain: list[tuple[Metric, Mapping[str, Any], str, float]] = [
        (HEALTHY, status, "healthy", 1),
        (DRAINING, status, "draining", 1),
        (SEQUENCES_RUNNING, load, "running", 1),
        (SEQUENCES_WAITING, load, "waiting", 1),
        (SEQUENCES_PARKED, status, "parked", 1),
        (WAITING_TOKENS, load, "waiting_tokens", 1),
        (PASS_SECONDS, load, "pass_s", 1),
        (TOKEN_SECONDS, load, "token_s", 1),
        (STORE_BYTES, load, "store_bytes_total", 1),
        (STORE_BYTES_USED, load, "store_bytes_used", 1),
        (STORE_BYTES_QUARANTINED, store, "quarantined", itemsize),
        (STORE_OBJECTS, store, "num_objects", 1),
        (STORE_LEASES, store, "num_leases", 1),
        (EVICTIONS, store, "num_evictions", 1),
        (READS, transfers, "reads", 1),
        (READ_BYTES, transfers, "bytes_read", 1),
        (ENCODED_ITEMS, status, "encoded_items", 1),
        (ENCODED_TOKENS, status, "encoded_tokens", 1),
        (HANDOFF_BYTES, status, "handoff_bytes", 1),
    ]
    if engine := status.get("engine"):
        plain += [
            (KV_BLOCKS, load, "kv_blocks_total", 1),
            (KV_BLOCKS_FREE, load, "kv_blocks_free", 1),
            (ENGINE_STEPS, engine, "steps", 1),
            (ENGINE_PROMPT_TOKENS, engine, "prompt_tokens", 1),
            (GENERATED_TOKENS, engine, "generated_tokens", 1),
            (SCATTERED_TOKENS, engine, "scattered_tokens", 1),
            (SPANS_RECORDED, engine, "spans_recorded", 1),
            (SPANS_REUSED, engine, "spans_reused", 1),
            (SPANS_WATCHED, engine, "spans_watched", 1),
            (SPANS_ESCALATED, engine, "spans_escalated", 1),
        ]
        if guard := status.get("guard"):
            plain.append((SHADOW_SECONDS, guard, "shadow_s", 1))
            for name, about in guard["formats"].items():
                yield from ((metric, about[key], {"format": name}) for metric, key in _DRIFT)
                yield from ((metric, about["own"][key], {"format": name}) for metric, key in _OWN_DRIFT)
        yield from ((SEQUENCES, engine[how], {"outcome": how}) for how in ("finished", "aborted", "failed"))
        yield from ((PREFIX_HIT_TOKENS, engine[f"{kind}_hit_tokens"], {"cache": kind}) for kind in ("exact", "approx"))
    yield from ((metric, source[key] * scale, {}) for metric, source, key, scale in plain if key in source)
    yield from ((READ_FAILURES, count, {"error": error}) for error, count in transfers["failures"].items())
