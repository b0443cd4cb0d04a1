"""How long the slowest step of a stream of random requests takes, right after start: ``python benchmarks/stalls.py
--shape 7b --json FILE [--cold-start]``.

Requests arrive at random: text, pictures never seen, pictures in the store, several at a time, of random lengths,
greedy and not. Between them the engine idles as its driver lets it. A step is compared with the median of steps of its
kind and size, so that what stands out is what happened once: a kernel compiled, a graph captured. ``--cold-start``
leaves the warm-up out, except for one short text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())  # a machine that has compiled nothing yet

import numpy as np
import torch

from vlcache_dist.bench.ttft import Bench, machine
from vlcache_dist.engine.api import Admitted, Compute, Failed, Reuse, TokenEvent
from vlcache_dist.engine.driver import IDLE_SHARE
from vlcache_dist.engine.engine import new_variant
from vlcache_dist.engine.warmup import warm_up
from vlcache_dist.types import MediaSpan, ObjectKind, ReuseMode, SamplingParams
from vlcache_dist.wire import Generation

SIZES = (64, 144, 256, 400, 784, 1024, 1600, 2304, 4096)
STALL_MS = 100.0


@dataclass(frozen=True, slots=True)
class Step:
    """``kind``: cold (a picture was encoded or computed), warm, text; ``over_ms``: more than steps like it."""

    at_s: float
    kind: str
    rows: int
    ms: float


class Stream:
    """Random requests against one engine."""

    def __init__(self, bench: Bench, sizes: tuple[int, ...], seed: int) -> None:
        self.bench = bench
        self.rng = np.random.default_rng(seed)
        self.images = [bench.image(size) for size in sizes for _ in range(2)]
        self.sources: dict[str, list[Any]] = {}
        self.open: set[str] = set()
        self.steps: list[Step] = []
        self.towers_ms: list[float] = []
        self.idle_ms: list[float] = []
        self.late_ms: list[float] = []

    def run(self, requests: int, rate: float) -> float:
        """``requests`` of them, ``rate`` per second; seconds until all are answered."""
        started, engine = time.perf_counter(), self.bench.engine
        idle_at = started
        due = started + np.cumsum(self.rng.exponential(1 / rate, requests))
        sent = 0
        while sent < requests or self.open:
            now = time.perf_counter()
            while sent < requests and due[sent] <= now:
                self._ask(sent)
                self.late_ms.append((time.perf_counter() - due[sent]) * 1e3)
                sent, idle_at = sent + 1, now if idle_at == math.inf else idle_at
            if engine.has_work():
                self._step(started)
            elif idle_at <= now:
                more = engine.idle() or self.bench.tower.prepare()
                took = time.perf_counter() - now
                idle_at = now + took / IDLE_SHARE if more else math.inf
                self.idle_ms += [took * 1e3] * more
            elif sent < requests:
                time.sleep(max(0.0, min(due[sent], idle_at) - time.perf_counter()))
        return time.perf_counter() - started

    def _ask(self, number: int) -> None:
        bench, rng = self.bench, self.rng
        chosen = [self.images[i] for i in rng.choice(len(self.images), int(rng.choice([0, 1, 1, 1, 2])), replace=False)]
        before, behind = int(rng.integers(4, 400)), int(rng.integers(4, 200))
        tokens: list[int] = rng.integers(1, min(bench.config.image_token_id, 800), before).tolist()
        spans, sources = [], []
        for index, image in enumerate(chosen):
            if rng.random() < 0.3:
                image.key = rng.bytes(32)
            spans.append(MediaSpan(image.key, len(tokens), image.tokens, image.grid, index=index))
            tokens += [bench.config.image_token_id] * image.tokens + [1]
            sources.append(image)
        tokens += rng.integers(1, min(bench.config.image_token_id, 800), behind).tolist()
        name = f"stream {number}"
        sampling = SamplingParams(
            max_tokens=int(rng.integers(1, 24)), temperature=float(rng.choice([0, 0, 0.7])), ignore_eos=True
        )
        self.sources[name] = sources
        self.open.add(name)
        generation = Generation(
            name,
            "",
            tuple(tokens),
            tuple(spans),
            sampling,
            ReuseMode.APPROX,
            str(rng.choice(["uniform:5", "uniform:2"])),
        )
        bench.engine.add(generation, time.monotonic())

    def _step(self, started: float) -> None:
        engine = self.bench.engine
        rows = engine.stats().layer_rows[0]
        recorded = engine.stats().spans_recorded
        scattered = engine.stats().scattered_tokens
        before = time.perf_counter()
        events = engine.step(time.monotonic())
        took = (time.perf_counter() - before) * 1e3
        stats = engine.stats()
        kind = "cold" if stats.spans_recorded > recorded else "warm" if stats.scattered_tokens > scattered else "text"
        if stats.layer_rows[0] > rows:
            self.steps.append(Step(before - started, kind, stats.layer_rows[0] - rows, took))
        for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Admitted):
                for index in event.needed:
                    engine.provide(event.request_id, index, self._source(event.request_id, index))
            if isinstance(event, TokenEvent) and event.finish is not None:
                self.open.discard(event.request_id)

    def _source(self, name: str, index: int) -> Compute | Reuse:
        bench, image = self.bench, self.sources[name][index]
        key = next(s.key for s in bench.engine._sequences[name].generation.spans if s.index == index)
        kv = bench.store.lookup(ObjectKind.KV, key, pin=True)
        rows = bench.store.lookup(ObjectKind.EMBEDDING, key, pin=True)
        if kv is not None and rows is not None:
            return Reuse(kv, bench.plan.depths(image.tokens, bench.layout.num_layers), rows)
        if kv is not None:
            bench.store.unpin(kv)
        if rows is None:
            before = time.perf_counter()
            out = bench.tower.forward(image.patches, [image.grid])
            extent = bench.store.begin(
                ObjectKind.EMBEDDING,
                key,
                new_variant(),
                bench.layout.embedding_elements(image.tokens),
                time.monotonic(),
            )
            bench.engine.runner.store_embeddings(out, extent)
            self.towers_ms.append((time.perf_counter() - before) * 1e3)
            rows = bench.store.commit(extent, pin=True)
        record = None
        if bench.engine.recordable(name, index) and kv is None:
            elements = bench.layout.kv_elements(image.tokens)
            record = bench.store.begin(ObjectKind.KV, key, new_variant(), elements, time.monotonic())
        return Compute(rows, record)


def over(steps: list[Step]) -> list[float]:
    """Milliseconds by which each step exceeds the median of steps of its kind whose rows are about as many."""
    alike: dict[tuple[str, int], list[float]] = defaultdict(list)
    for step in steps:
        alike[step.kind, step.rows.bit_length()].append(step.ms)
    return [step.ms - statistics.median(alike[step.kind, step.rows.bit_length()]) for step in steps]


def run(
    shape: str, device: str, requests: int, rate: float, cold_start: bool, sizes: tuple[int, ...]
) -> dict[str, Any]:
    """The report; times in milliseconds."""
    bench = Bench(shape, device, 2 * len(sizes) * max(sizes) // 3, "uniform:5", max_batch_tokens=2048)
    started = time.perf_counter()
    if not cold_start:
        bench.tower.warm_up(bench.engine.config.graph_start_s)
        warm_up(bench.engine)
    else:
        bench.decode_ms(1)
    start_s = time.perf_counter() - started
    at_start = bench.engine.runner.graph_report()
    stream = Stream(bench, sizes, seed=1)
    took = stream.run(requests, rate)
    times = sorted(step.ms for step in stream.steps)
    excess = over(stream.steps)
    worst = sorted(zip(excess, stream.steps, strict=True), key=lambda pair: -pair[0])[:12]
    report = bench.engine.runner.graph_report()
    tower = bench.tower.graph_report()
    return {
        "machine": machine(device), "shape": shape, "requests": requests, "rate": rate, "cold_start": cold_start,
        "start_s": start_s, "stream_s": took, "steps": len(times),
        "step_ms": {"p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99)], "max": times[-1]},
        "stalls": sum(ms > STALL_MS for ms in excess), "stall_ms": STALL_MS, "most_over_ms": max(excess),
        "stalled_s": sum(ms for ms in excess if ms > STALL_MS) / 1e3,
        "idle_ms": {"count": len(stream.idle_ms), "max": max(stream.idle_ms, default=0.0)},
        "seen_late_ms": {"p50": float(statistics.median(stream.late_ms)), "max": float(max(stream.late_ms))},
        "tower_ms": {"max": max(stream.towers_ms, default=0.0), "count": len(stream.towers_ms)},
        "graphs_at_start": None if at_start is None else asdict(at_start),
        "graphs": None if report is None else asdict(report), "tower_graphs": None if tower is None else asdict(tower),
        "worst": [asdict(step) | {"over_ms": ms} for ms, step in worst],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--cold-start", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = tuple(int(n) for n in options.sizes.split(","))
    report = run(options.shape, options.device, options.requests, options.rate, options.cold_start, sizes)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print({k: v for k, v in report.items() if k not in ("worst", "machine")})
    for row in report["worst"][:6]:
        print(row)
