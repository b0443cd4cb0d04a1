"""Placement policies on real workers: ``python benchmarks/placement.py --json FILE``.

One deployment after the other, each with another ``serve.placement`` and an empty cache, is sent the same requests at
the same times. The simulation beside it is ``vlcache-dist bench placement``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from vlcache_dist.config import Settings
from vlcache_dist.loadtest import arrivals, scenario
from vlcache_dist.loadtest.analysis import summarize
from vlcache_dist.loadtest.client import Job, drive
from vlcache_dist.loadtest.dataset import render
from vlcache_dist.loadtest.records import Objective
from vlcache_dist.loadtest.run import LEAD_S, WARM_UP, find
from vlcache_dist.serve.cluster import running
from vlcache_dist.serve.placement import POLICIES


def measure(policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row: the policy's figures over one run of the requests."""
    each = scenario.SCENARIOS[options.scenario]
    count = round(options.rate * options.seconds)
    requests = render(each, scenario.plan(each, options.share / 100, count, options.seed), options.seed)
    warm_up = render(each, scenario.plan(each, 0.5, WARM_UP * options.prefills, options.seed + 1), options.seed + 1)
    serve = {"port": 0, "prefills": options.prefills, "decodes": options.decodes, "placement": policy}
    settings = Settings.read(options.config, serve=serve)
    with running(settings, say=lambda text: print(f"{policy}: {text}", flush=True)) as url:
        target = find(url)
        job = Job("warm-up", target, "approx", time.time(), (0.0,) * len(warm_up), tuple(warm_up), 60.0)
        for _ in drive(job):
            pass
        times = tuple(arrivals.schedule(count, options.rate, options.seed))
        job = Job("client", target, "approx", time.time() + LEAD_S, times, tuple(requests), 60.0)
        records = [record for batch in drive(job) for record in batch]
    by_worker = {name: sum(r.prefill_worker == name for r in records) for name in {r.prefill_worker for r in records}}
    summary = summarize(records, Objective(options.ttft_ms, 1e9))
    return {
        "policy": policy,
        "requests": summary.sent,
        "answered": summary.answered,
        "right": summary.right,
        "ttft_mean_ms": round(sum(r.ttft_ms for r in records) / len(records), 2),
        "ttft_p50_ms": round(summary.ttft_p50, 2),
        "ttft_p90_ms": round(summary.ttft_p90, 2),
        "ttft_p99_ms": round(summary.ttft_p99, 2),
        "goodput": summary.goodput,
        "tokens": summary.tokens,
        "bytes_fetched": summary.bytes_fetched,
        "requests_by_worker": dict(sorted(by_worker.items())),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", default="document-qa", choices=list(scenario.SCENARIOS))
    parser.add_argument("--rate", type=float, default=6.0)
    parser.add_argument("--share", type=float, default=75.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--decodes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ttft-ms", type=float, default=500.0)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--config")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [measure(policy, options) for policy in options.policies.split(",")]
    machine = {"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()}
    asked = {name: getattr(options, name) for name in ("scenario", "rate", "share", "seconds", "prefills", "seed")}
    options.json.write_text(json.dumps({"machine": machine, **asked, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)
