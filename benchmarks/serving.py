"""Serving on two devices: a deployment with a decode pool against one without, each with reuse and without it.

    python benchmarks/serving.py --shape 7b --json FILE
    python benchmarks/serving.py --shape tiny --device cpu --rate 2 --duration 2 --json FILE     # a rehearsal

Both deployments have the same two devices, an encoder and a prefill worker on each:

    disaggregated   the second device also runs a decode worker, which takes over every sequence
    colocated       both prefill workers decode what they prefilled; no decode pool

Weights are random (``vlcache_dist.bench.checkpoint``), so answers mean nothing and are not judged; times, bytes and
counts are real, and the load test's own check that counters and clients agree is in force. Every point is measured as
the load test measures it: the same requests at the same times with ``reuse=off`` and with reuse, on pictures of its
own. The file is written after every point, so that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from vlcache_dist.bench.checkpoint import write_random
from vlcache_dist.bench.two_devices import DEVICES, Report, free_port, machine, two_nodes
from vlcache_dist.config import Settings
from vlcache_dist.loadtest import dataset
from vlcache_dist.loadtest.client import Target
from vlcache_dist.loadtest.records import Objective, Point, Run
from vlcache_dist.loadtest.run import Options, find, measure
from vlcache_dist.loadtest.scenario import Scenario, plan

WORKERS_PER_DEVICE = 3  #: at most: encoder, prefill, decode
LAYOUTS = {"disaggregated": {"prefills": 2, "decodes": 1}, "colocated": {"prefills": 2, "decodes": 0}}
GIB = 1 << 30
WARM_UPS = 1
LATER = 0.42  #: share of the time limit that is kept for each later layout; the first one compiles kernels


@dataclass(frozen=True)
class Case:
    """One point: a scenario at a share of repeated image slots (0 to below 1)."""

    scenario: Scenario
    share: float


def cases(side: int, max_tokens: int, shares: list[float]) -> list[Case]:
    """Pictures of ``side`` x ``side`` vision tokens at every share; then long text around small pictures, where there
    is little to reuse."""
    images = Scenario("images", sizes=((side, side),), preamble_words=40, max_tokens=max_tokens)
    text = Scenario("text", sizes=((8, 8),), preamble_words=600, max_tokens=max_tokens)
    return [*(Case(images, share) for share in shares), Case(text, 0.5)]


def settings(layout: str, model: Path, device: str, port: int, address: str) -> Settings:
    engine = {"kv_bytes": 8 * GIB, "store_bytes": 12 * GIB} if device == "cuda" else {"kv_bytes": 64 << 20}
    return Settings.of(
        model={"model": str(model), "served_name": "random", "device": device, "max_model_len": 4096},
        engine={"store_bytes": 128 << 20, **engine},
        serve={
            **LAYOUTS[layout],
            "encoders": DEVICES,
            "port": port,
            "address": address,
            "pool_resources": True,
            "gpus_per_worker": round(1 / WORKERS_PER_DEVICE, 2) if device == "cuda" else 0.0,
        },
    )


def row(layout: str, point: Point) -> list[dict[str, Any]]:
    """A measured point without its single requests."""
    about = {"layout": layout, "scenario": point.scenario, "rate": point.rate, "repeated": point.repeated}
    return [{**about, "reuse": arm.reuse, **msgspec.to_builtins(arm.summary)} for arm in point.arms]


def measure_layout(name: str, each: list[Case], base: Options, config: Settings, report: Report, until: float) -> None:
    """Start a deployment, warm it up with a measurement that is thrown away, measure the cases, stop it."""
    from vlcache_dist.serve.cluster import running

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {name}: {text}", file=sys.stderr, flush=True)

    with running(config, ready_s=120.0, say=say) as url:
        target = find(url)
        for scenario in (each[0].scenario, each[-1].scenario):
            touch(target, scenario, base, say)
        for number, case in enumerate([*warm_ups(each), *each]):
            if time.monotonic() > until:
                say("out of time")
                return
            options = point_options(base, number, case)
            try:
                run = measure(target, options, lambda what, done, total: None)
            except Exception as error:
                say(f"{case.scenario.name} {case.share:.0%}: {type(error).__name__}: {error}")
                if number >= WARM_UPS:
                    report.fail(f"{name}, {case.scenario.name}, {case.share:.0%}", error)
                continue
            if number >= WARM_UPS:
                report.add(row(name, run.points[0]))
            say(f"{'' if number >= WARM_UPS else 'warm-up, '}{case.scenario.name} {case.share:.0%}: {line_of(run)}")


def warm_ups(each: list[Case]) -> list[Case]:
    """Measurements that are thrown away: graphs are captured and kernels compiled in them."""
    return [Case(each[0].scenario, 0.5)]


def point_options(base: Options, number: int, case: Case) -> Options:
    """Of the point with this number, warm-ups included; every point has pictures of its own."""
    seconds = base.duration_s if number >= WARM_UPS else base.duration_s / 2
    return msgspec.structs.replace(
        base, scenarios=(case.scenario,), shares=(case.share,), duration_s=seconds, seed=base.seed + 100 * number
    )


def touch(target: Target, each: Scenario, base: Options, say: Callable[[str], None]) -> None:
    """One picture, three times through every prefill worker: the first kernels take a minute to compile, which no
    measurement should have to wait for."""
    (request,) = dataset.render(each, plan(each, 0.0, 1, base.seed + 99), base.seed)
    status = httpx.get(f"{target.url}/status", timeout=30.0).raise_for_status().json()

    def ask(worker: str) -> None:
        for reuse in ("off", "approx", "approx"):
            body = json.loads(request.body(target.model, reuse))
            body["vlcache"]["prefill_worker"] = worker
            reply = httpx.post(f"{target.url}/v1/chat/completions", json=body, timeout=110.0)
            say(f"first requests: {worker}, reuse={reuse}: HTTP {reply.status_code}")

    workers = [each["name"] for each in status["workers"] if each["role"] in ("prefill", "colocated")]
    with ThreadPoolExecutor(len(workers)) as threads:
        for outcome in [threads.submit(ask, worker) for worker in workers]:
            if error := outcome.exception():
                say(f"first requests: {type(error).__name__}: {error}")


def line_of(run: Run) -> str:
    return "; ".join(
        f"{arm.reuse}: TTFT p50 {arm.summary.ttft_p50:.0f} p99 {arm.summary.ttft_p99:.0f} ms, ITL p50 "
        f"{arm.summary.itl_p50:.1f} ms, goodput {arm.summary.goodput:.2f}/s, hits {arm.summary.hit_share:.0%}"
        for arm in run.points[0].arms
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", help="7b, 3b or tiny")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS), help="repeatable [default: all]")
    parser.add_argument("--side", type=int, default=32, help="a picture has side x side vision tokens")
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second")
    parser.add_argument("--duration", type=float, default=6.0, help="seconds of arrivals per arm")
    parser.add_argument("--share", type=float, action="append", help="percent; repeatable [default: 95 0 50]")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--ttft", type=float, default=200.0, help="objective, ms")
    parser.add_argument("--itl", type=float, default=50.0, help="objective, ms")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no further point is begun")
    parser.add_argument("--checkpoint", type=Path, help="folder of the random checkpoint; kept for the next run")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    began = time.monotonic()
    layouts = given.layout or list(LAYOUTS)
    each = cases(given.side, given.max_tokens, [share / 100 for share in given.share or (95.0, 0.0, 50.0)])
    base = Options(
        scenarios=(),
        rates=(given.rate,),
        shares=(),
        objective=Objective(given.ttft, given.itl),
        duration_s=given.duration,
        timeout_s=60.0,
        seed=1,
    )
    about = {
        "machine": machine(given.device),
        "shape": given.shape,
        "weights": "random",
        "devices": DEVICES,
        "objective": msgspec.to_builtins(base.objective),
        "scenarios": [msgspec.to_builtins(case.scenario) for case in (each[0], each[-1])],
        "duration_s": given.duration,
    }
    report = Report(given.json, about)
    with tempfile.TemporaryDirectory() as temporary:
        model = given.checkpoint or Path(temporary) / "checkpoint"
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=write_random, args=(model, given.shape, given.device))
        if not (model / "model.safetensors.index.json").exists():
            writer.start()
        with ThreadPoolExecutor(1) as drawing, two_nodes(given.device) as address:
            drawn = drawing.submit(_draw, each, base)
            if writer.pid is not None:
                writer.join()
                if writer.exitcode:
                    return 1
            drawn.result()
            print(f"prepared in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            port = free_port()
            for number, layout in enumerate(layouts, start=1):
                until = began + given.limit * (1 - LATER * (len(layouts) - number))
                config = settings(layout, model, given.device, port, address)
                try:
                    measure_layout(layout, each, base, config, report, until)
                except Exception as error:
                    report.fail(layout, error)
    report.contents["wall_s"] = round(time.monotonic() - began, 1)
    report.write()
    return 1 if report.contents["errors"] else 0


def _draw(each: list[Case], base: Options) -> None:
    """All pictures of the run, before anything is timed: as ``measure_layout`` and ``measure`` will ask for them."""
    planned = []
    for number, case in enumerate([*warm_ups(each), *each]):
        options = point_options(base, number, case)
        planned += plan(case.scenario, case.share, options.count(options.rates[0]), options.seed + 1)
    dataset.prepare(planned)


if __name__ == "__main__":
    sys.exit(main())
