"""Everything that docs/reuse.md says of the bundled model, in one resumable run:

    python benchmarks/quality.py --workers 16 --json benchmarks/results/quality-tiny.json
    vlcache-dist eval --from-json benchmarks/results/quality-tiny.json --plots docs/pictures

Finished batches go to ``--work`` (a .jsonl per part): the same command goes on where a stopped one left off. Parts can
be run by themselves (``--parts``); what the others left in the JSON stays in it. Tuning sees the suite ``tune`` with
seeds below 1,000 only; what is reported of ``held-out`` has seed 1,000 and above.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_dist.evaluate import cli, detector, report
from vlcache_dist.evaluate.calibration import Calibration, Goal, calibrate
from vlcache_dist.evaluate.cases import Case
from vlcache_dist.evaluate.errors import error_units, read_errors
from vlcache_dist.evaluate.figures import write_json
from vlcache_dist.evaluate.generated import generate
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.names import spell_out, under_names
from vlcache_dist.evaluate.positions import position_units, read_positions
from vlcache_dist.evaluate.run import outcome_units, read_outcomes
from vlcache_dist.evaluate.study import read_sightings, sighting_units
from vlcache_dist.evaluate.targets import BUDGETS
from vlcache_dist.evaluate.ttft import time_to_first_token
from vlcache_dist.evaluate.workers import BenchSpec, Unit, run_units
from vlcache_dist.reuse.evidence import HEALTHY
from vlcache_dist.reuse.guard import Guard, Shadow
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.reuse.plan_file import parse_plan_file

TUNE_SEED, HELD_OUT_SEED = 0, 1000
ROLE_CHANGES = ("swapped labels", "alone, then one of two")
UNCHANGED = "other text before"
PROBE_SETS = [(0, 1), (1, 2), (0, 8), (0, 3)]
POLICIES = [
    *("full", "none", "unrotated", "mpic:4", "shift:1", "shift:3", "pyramid:10-0", "inverse:0-10"),
    *(f"{name}:{percent}" for percent in BUDGETS for name in ("uniform", "blend", "calibrated")),
    *(f"{name}:{percent}" for percent in (5, 20) for name in ("random", "last", "epic")),
    *("attend:3@8+shift:1", "canary", "calibrated", "guarded"),
]
WATCHED = "none+canary:0,3,5<1000"  #: the first pass of ``guarded``, and nobody judges it
SEEDS = (TUNE_SEED + 10, TUNE_SEED + 11, TUNE_SEED + 12)


class Run:
    """Options, and the JSON that parts add to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.spec = options, BenchSpec("tiny", options.device, options.dtype)
        self.checkpoint = cli.checkpoint(self.spec)
        self.figures: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
        self.figures |= {
            "model": "tiny",
            "fingerprint": self.checkpoint.fingerprint,
            "dtype": options.dtype,
            "device": options.device,
            "machine": f"{os.cpu_count()} cores {platform.machine()}",
        }

    def cases(self, wanted: int) -> int:
        return min(wanted, self.options.most)

    def journal(self, part: str, cases: Sequence[Case]) -> Journal:
        self.options.work.mkdir(parents=True, exist_ok=True)
        made_by = {"model": self.checkpoint.fingerprint, "dtype": self.options.dtype, "cases": cli.digest(cases)}
        return Journal(self.options.work / f"{part}.jsonl", made_by)

    def do(self, stage: str, units: Sequence[Unit], journal: Journal) -> None:
        run_units(self.spec, units, journal, self.options.workers, lambda done, total: self.say(stage, done, total))

    def rows(self, part: str, cases: Sequence[Case], policies: Sequence[str]) -> list[dict[str, Any]]:
        journal = self.journal(part, cases)
        names = self.plans(policies)
        spellings = list(dict.fromkeys(names.values()))
        self.do(part, outcome_units(cases, spellings, journal), journal)
        return under_names(report.rows(read_outcomes(cases, spellings, journal)), names)

    def plans(self, names: Sequence[str]) -> dict[str, str]:
        """Spellings by name. ``calibrated:5`` is what calibration found best at 5 %, ``calibrated`` the plan that it
        wrote; both are left out where it has not run."""
        found = self.figures.get("calibration", {}).get("plans", {})
        known = [name for name in names if not name.startswith("calibrated")]
        layers = self.checkpoint.config.text.num_layers
        spelled = spell_out(known, model=self.checkpoint.fingerprint, num_layers=layers) | found
        return {name: spelled[name] for name in names if name in spelled}

    def save(self, **parts: Any) -> None:
        self.figures |= parts
        write_json(self.options.json, self.figures)

    @staticmethod
    def say(stage: str, done: int, total: int) -> None:
        print(f"{stage}: {done} of {total}", flush=True)


def calibration(run: Run) -> None:
    cases = generate("tune", run.cases(32), TUNE_SEED)
    work = Calibration(run.spec, run.journal("calibration", cases), run.options.workers, run.say)
    layers = run.checkpoint.config.text.num_layers
    goal = Goal(budget=5.0)
    contents = calibrate(work, cases, goal, model=run.checkpoint.fingerprint, num_layers=layers, data="suite tune")
    found = contents["provenance"]
    helps = np.argsort(found["sensitivity"]["kl_by_fresh_layer"], kind="stable")[:1].tolist()
    plan = parse_plan_file(
        json.dumps(contents).encode(), model=run.checkpoint.fingerprint, num_layers=layers, name="calibration"
    )
    plans = {"calibrated": str(plan), "calibrated:5": found["repair"]["policy"]}
    for budget in BUDGETS[1:]:
        plans[f"calibrated:{budget}"] = work.repair(cases, helps, budget)["policy"]
    run.save(
        calibration={"plans": plans, "canary": contents["canary"], "percents": contents["percents"], **found},
    )


def policies(run: Run) -> None:
    cases = generate("held-out", run.cases(32), HELD_OUT_SEED)
    run.save(
        suite="held-out", seed=HELD_OUT_SEED, plans=run.plans(POLICIES), rows=run.rows("policies", cases, POLICIES)
    )


def many(run: Run) -> None:
    """The policies that matter over 1,008 cases, and what those that judge themselves catch."""
    cases = generate("held-out", run.cases(84), HELD_OUT_SEED + 1)
    rows = run.rows("many", cases, ["none", "uniform:5", "calibrated:5", WATCHED, "canary", "calibrated", "guarded"])
    outcomes: dict[str, list[report.Outcome]] = {}
    judging = run.plans([WATCHED, "canary", "calibrated", "guarded"])
    for outcome in read_outcomes(cases, list(judging.values()), run.journal("many", cases)):
        outcomes.setdefault(outcome.policy, []).append(outcome)
    unwatched = outcomes[judging.pop(WATCHED)]
    found = {name: detector.verdicts(unwatched, outcomes[spelling]) for name, spelling in judging.items()}
    run.save(
        many={"seed": HELD_OUT_SEED + 1, "rows": [row for row in rows if row["policy"] != WATCHED]},
        detector={**run.figures.get("detector", {}), "verdicts": found},
    )


def detectors(run: Run) -> None:
    tune = generate("tune", run.cases(64), TUNE_SEED + 1)
    held = generate("held-out", run.cases(84), HELD_OUT_SEED + 2)
    found = []
    for part, cases in (("detector-tune", tune), ("detector-held-out", held)):
        journal = run.journal(part, cases)
        run.do(part, sighting_units(cases, PROBE_SETS, journal), journal)
        found.append({probes: read_sightings(cases, probes, journal) for probes in PROBE_SETS})
    run.save(detector={**run.figures.get("detector", {}), **detector.figures(*found)})


def more_suites(run: Run) -> None:
    rows = []
    for suite in ("sizes", "multi-hop"):
        cases = generate(suite, run.cases(32), HELD_OUT_SEED)
        found = run.rows(suite, cases, ["none", "uniform:5", "calibrated:5", "guarded"])
        rows += [{"suite": suite, **row} for row in found]
    run.save(more_suites=rows)


def shares(run: Run) -> None:
    """First, last, random tokens at growing shares, where a picture changes its role: do early tokens matter most?"""
    names = [f"{choice}:{share}" for choice in ("uniform", "last", "random") for share in (5, 20, 50)]
    rows = []
    for seed in SEEDS:
        cases = [c for c in generate("tune", run.cases(16), seed) if c.format in ROLE_CHANGES]
        for row in run.rows(f"shares-{seed}", cases, [*names, "calibrated:5"]):
            rows.append({"seed": seed, "choice": row["policy"].partition(":")[0], **row})
    run.save(shares=rows)


def seeds(run: Run) -> None:
    """The sensitivity of layers and of parts of a picture, for several seeds of the scenes, where a role changes."""
    found = []
    for seed in SEEDS:
        cases = [c for c in generate("tune", run.cases(16), seed) if c.format in ROLE_CHANGES]
        work = Calibration(run.spec, run.journal(f"seeds-{seed}", cases), run.options.workers, run.say)
        found.append({"seed": seed, **work.sensitivity(cases, run.checkpoint.config.text.num_layers)})
    run.save(seeds=found)


def errors(run: Run) -> None:
    cases = [c for c in generate("tune", run.cases(16), TUNE_SEED + 20) if c.format in (*ROLE_CHANGES, UNCHANGED)]
    plans = ["none", *(f"{choice}:{share}" for share in (5, 20, 50) for choice in ("uniform", "last"))]
    journal = run.journal("errors", cases)
    run.do("errors", error_units(cases, plans, journal), journal)
    run.save(errors=read_errors(cases, plans, journal))


def guard(run: Run) -> None:
    """Simulated: requests until the live guard notices a plan that fails half of them, at a forced sampling of 5 %, and
    10,000 requests of which as many are harmed as counts as healthy."""
    failing = [_trips(seed, 1000, 0.5) for seed in range(run.cases(1000))]
    healthy = [_trips(seed, 10_000, HEALTHY) for seed in range(run.cases(100))]
    noticed = sorted(n if n is not None else 1001 for n in failing)
    run.save(
        guard={
            "sampling": 0.05,
            "failing": {
                "runs": len(noticed),
                "median": noticed[len(noticed) // 2],
                "p99": noticed[len(noticed) * 99 // 100],
                "late": sum(n > 200 for n in noticed),
            },
            "healthy": {"runs": len(healthy), "tripped": sum(n is not None for n in healthy)},
        }
    )


def _trips(seed: int, requests: int, harm: float) -> int | None:
    """The first request that trips a guard when each is harmed with probability ``harm``."""
    watch, rng, plan = Guard(sampling=0.05, seed=seed), random.Random(f"harm {seed}"), Plan.parse("uniform:5")
    for number in range(1, requests + 1):
        if watch.decide("f").sampled:
            bad = rng.random() < harm
            watch.observe("f", plan, Shadow(8.0 if bad else 0.0, not bad, False))
            if watch.status()["formats"]["f"]["trips"]:
                return number
    return None


def positions(run: Run) -> None:
    cases = generate("tune", run.cases(32), TUNE_SEED)
    journal = run.journal("positions", cases)
    run.do("positions", position_units(cases, journal), journal)
    run.save(positions=read_positions(cases, journal))


def ttft(run: Run) -> None:
    wanted = ("long prefix", "swapped labels", "sliding window")
    many = [*generate("tune", run.cases(4), TUNE_SEED), *generate("held-out", run.cases(4), HELD_OUT_SEED)]
    cases = [case for case in many if case.format in wanted]
    names = ["none", "uniform:5", "uniform:20", "pyramid:10-0", WATCHED, "canary", "guarded"]
    plans = run.plans(names)
    run.save(ttft=time_to_first_token(run.spec, cases, plans, lambda done, total: run.say("ttft", done, total)))


PARTS: dict[str, Callable[[Run], None]] = {
    "calibration": calibration,
    "policies": policies,
    "detector": detectors,
    "more-suites": more_suites,
    "shares": shares,
    "seeds": seeds,
    "errors": errors,
    "guard": guard,
    "positions": positions,
    "ttft": ttft,
    "many": many,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="folder of finished batches")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--most", type=int, default=1 << 20, help="cases per format, at most: for a trial run")
    parser.add_argument("--parts", default=",".join(PARTS))
    chosen = parser.parse_args()
    started = Run(chosen)
    for part in chosen.parts.split(","):
        PARTS[part](started)
