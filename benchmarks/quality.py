"""Everything that docs/reuse.md and docs/tiny-model.md say of the bundled model, in resumable parts:

    python benchmarks/quality.py --workers 16 --json benchmarks/results/quality-tiny.json
    vlcache-dist eval --from-json benchmarks/results/quality-tiny.json --plots docs/pictures
    python benchmarks/quality_tables.py docs/reuse.md docs/tiny-model.md

Finished batches go to ``--work`` (a .jsonl per part): the same command goes on where a stopped one left off. Parts can
be run by themselves (``--parts``), two commands side by side on different parts too; what others left in the JSON stays
in it. ``held-out`` wants what ``calibration`` found. Tuning sees the suite ``tune`` with seeds below
1,000 only; what is reported of ``held-out`` has seed 3,000.
"""

from __future__ import annotations

import argparse
import fcntl
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
from vlcache_dist.evaluate.cases import BATCH, Case, by_format
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
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import BenchSpec, Unit, joined, run_units
from vlcache_dist.reuse.evidence import HEALTHY
from vlcache_dist.reuse.guard import Guard, Shadow
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.reuse.plan_file import parse_plan_file

TUNE_SEED, HELD_OUT_SEED = 0, 3000
SEEDS = (TUNE_SEED + 10, TUNE_SEED + 11, TUNE_SEED + 12)
ROLE_CHANGES = ("swapped labels", "rows from the bottom, recorded without")
UNCHANGED = "other text before"
PROBE_SETS = [(0, 1), (1, 2), (0, 8), (0, 3)]
POLICIES = [
    *("full", "none", "unrotated", "mpic:4", "shift:1", "pyramid:10-0", "inverse:0-10"),
    *(f"{name}:{percent}" for percent in BUDGETS for name in ("uniform", "blend", "calibrated")),
    *("random:5", "last:5", "epic:5", "random:20", "last:20", "epic:20"),
    *("attend:3@8+shift:1", "canary", "calibrated", "guarded once", "guarded"),
]
MANY = ["none", "uniform:5", "calibrated:5", "canary", "calibrated", "guarded once", "guarded"]
WATCHED = "none+canary:0,3,5<1000"  #: the first pass of ``guarded``, and nobody judges it


class Run:
    """Options, and the JSON that parts add to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.spec = options, BenchSpec(options.model, options.device, options.dtype, trials=8)
        self.checkpoint = cli.checkpoint(self.spec)
        self.layers = self.checkpoint.config.text.num_layers
        self._bench: Workbench | None = None
        self.save(
            model=options.model,
            fingerprint=self.checkpoint.fingerprint,
            dtype=options.dtype,
            device=options.device,
            machine=f"{os.cpu_count()} cores {platform.machine()}",
        )

    @property
    def bench(self) -> Workbench | None:
        """Kept from part to part, where one process does it all."""
        if self.options.workers == 1 and self._bench is None:
            self._bench = self.spec.build()
        return self._bench

    def cases(self, wanted: int) -> int:
        return min(wanted, self.options.most)

    def journal(self, part: str, cases: Sequence[Case]) -> Journal:
        self.options.work.mkdir(parents=True, exist_ok=True)
        made_by = {"model": self.checkpoint.fingerprint, "dtype": self.options.dtype, "cases": cli.digest(cases)}
        return Journal(self.options.work / f"{part}.jsonl", made_by)

    def do(self, stage: str, units: Sequence[Unit], journal: Journal) -> None:
        workers = self.options.workers
        run_units(self.spec, units, journal, workers, lambda *at: self.say(stage, *at), self.bench)

    def calibration(self, part: str, cases: Sequence[Case]) -> Calibration:
        return Calibration(self.spec, self.journal(part, cases), self.options.workers, self.say, self.bench)

    def rows(self, part: str, cases: Sequence[Case], policies: Sequence[str]) -> list[dict[str, Any]]:
        journal, names = self.journal(part, cases), self.plans(policies)
        self.do(part, outcome_units(cases, unique(names), journal), journal)
        return under_names(report.rows(read_outcomes(cases, unique(names), journal)), names)

    def plans(self, names: Sequence[str]) -> dict[str, str]:
        """Spellings by name. ``calibrated:5`` is what calibration found best at 5 %, ``calibrated`` the plan that it
        wrote; both are left out where it has not run."""
        found = self.figures().get("calibration", {}).get("plans", {})
        known = [name for name in names if not name.startswith("calibrated")]
        spelled = spell_out(known, model=self.checkpoint.fingerprint, num_layers=self.layers) | found
        return {name: spelled[name] for name in names if name in spelled}

    def figures(self) -> dict[str, Any]:
        path = self.options.json
        return json.loads(path.read_text()) if path.exists() else {}

    def save(self, **parts: Any) -> None:
        """Add to the JSON. A part that is a dictionary is merged into what is there of it."""
        path = self.options.json
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            figures = self.figures()
            for name, part in parts.items():
                merge = isinstance(part, dict) and isinstance(figures.get(name), dict)
                figures[name] = figures[name] | part if merge else part
            draft = path.with_suffix(".new")
            write_json(draft, figures)
            draft.replace(path)
        path.with_suffix(".lock").unlink(missing_ok=True)

    @staticmethod
    def say(stage: str, done: int, total: int) -> None:
        print(f"{stage}: {done} of {total}", flush=True)


def unique(names: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(names.values()))


def abilities(run: Run) -> None:
    """What the model answers when everything is computed."""
    found = []
    for suite in ("abilities", "rules", "multi-hop"):
        rows = run.rows(f"abilities-{suite}", generate(suite, run.cases(2 * BATCH), TUNE_SEED + 30), ["full"])
        found += [{"suite": suite, **row} for row in rows if row["format"] != "all"]
    run.save(abilities=found)
    for row in found:
        print(f"{row['suite']}: {row['format']}: {row['full_exact_match']:.3f}")


def calibration(run: Run) -> None:
    cases = generate("tune", run.cases(BATCH), TUNE_SEED)
    work, model = run.calibration("calibration", cases), run.checkpoint.fingerprint
    contents = calibrate(work, cases, Goal(budget=5.0), model=model, num_layers=run.layers, data="suite tune")
    found = contents["provenance"]
    helps = np.argsort(found["sensitivity"]["kl_by_fresh_layer"], kind="stable")[:1].tolist()
    plan = parse_plan_file(json.dumps(contents).encode(), model=model, num_layers=run.layers, name="calibration")
    plans = {"calibrated": str(plan), "calibrated:5": found["repair"]["policy"]}
    for budget in BUDGETS[1:]:
        plans[f"calibrated:{budget}"] = work.repair(cases, helps, budget)["policy"]
    run.save(calibration={"plans": plans, "canary": contents["canary"], "percents": contents["percents"], **found})


def held_out(run: Run) -> None:
    """All policies on the first batch of every format; on all of its batches those that matter, what those that judge
    themselves catch, and what probes see."""
    cases = generate("held-out", run.cases(60), HELD_OUT_SEED)
    few = [case for group in by_format(cases).values() for case in group[:BATCH]]
    journal, shown, judging = run.journal("held-out", cases), run.plans(POLICIES), run.plans([WATCHED, *MANY])
    units = joined(
        journal,
        outcome_units(few, unique(shown), journal),
        outcome_units(cases, unique(judging), journal),
        sighting_units(cases, PROBE_SETS, journal),
    )
    run.do("held-out", units, journal)
    many = list(read_outcomes(cases, unique(judging), journal))
    outcomes = {name: [o for o in many if o.policy == spelling] for name, spelling in judging.items()}
    verdicts = {
        name: detector.verdicts(outcomes[WATCHED], outcomes[name])
        for name in ("canary", "calibrated", "guarded once", "guarded")
        if name in outcomes
    }
    del judging[WATCHED]
    run.save(
        suite="held-out",
        seed=HELD_OUT_SEED,
        plans=shown,
        rows=under_names(report.rows(read_outcomes(few, unique(shown), journal)), shown),
        many={"seed": HELD_OUT_SEED, "rows": under_names(report.rows(many), judging)},
        detector={**detect(run, journal, cases), "verdicts": verdicts},
    )


def detect(run: Run, journal: Journal, cases: Sequence[Case]) -> dict[str, Any]:
    tune, tuning = detector_tune(run)
    return detector.figures(
        {probes: read_sightings(tune, probes, tuning) for probes in PROBE_SETS},
        {probes: read_sightings(cases, probes, journal) for probes in PROBE_SETS},
    )


def detector_tune(run: Run) -> tuple[list[Case], Journal]:
    """The tuning half of what ``held-out`` says of probes, by itself: it does not wait for calibration."""
    tune = generate("tune", run.cases(64), TUNE_SEED + 1)
    tuning = run.journal("detector", tune)
    run.do("detector", sighting_units(tune, PROBE_SETS, tuning), tuning)
    return tune, tuning


def seeds(run: Run) -> None:
    """The two claims about where errors matter, for several seeds of the scenes, where a picture changes its role:
    first, last, random tokens at growing shares; one layer right, one part of the picture computed."""
    names = [f"{choice}:{share}" for choice in ("uniform", "last", "random") for share in (5, 20, 50)]
    rows, found = [], []
    for seed in SEEDS:
        cases = [c for c in generate("tune", run.cases(16), seed) if c.format in ROLE_CHANGES]
        for row in run.rows(f"seeds-{seed}", cases, names):
            rows.append({"seed": seed, "choice": row["policy"].partition(":")[0], **row})
        work = run.calibration(f"seeds-{seed}", cases)
        found.append({"seed": seed, **work.sensitivity(cases, run.layers)})
    run.save(shares=rows, seeds=found)


def errors(run: Run) -> None:
    cases = [c for c in generate("tune", run.cases(16), TUNE_SEED + 20) if c.format in (*ROLE_CHANGES, UNCHANGED)]
    plans = ["none", *(f"{choice}:{share}" for share in (5, 20, 50) for choice in ("uniform", "last"))]
    journal = run.journal("errors", cases)
    run.do("errors", error_units(cases, plans, journal), journal)
    run.save(errors=read_errors(cases, plans, journal))


def positions(run: Run) -> None:
    cases = generate("tune", run.cases(BATCH), TUNE_SEED)
    journal = run.journal("positions", cases)
    run.do("positions", position_units(cases, journal), journal)
    run.save(positions=read_positions(cases, journal))


def resume(run: Run) -> None:
    """Escalating from a layer boundary: what is left if all layers from it on are computed from the states that the
    picture's tokens had before it where they were recorded."""
    cases = [c for c in generate("tune", run.cases(BATCH), TUNE_SEED + 20) if c.format in ROLE_CHANGES]
    names = ["none", *(f"resume:{layer}" for layer in range(1, run.layers))]
    run.save(resume=[row for row in run.rows("resume", cases, names) if row["format"] != "all"])


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


def ttft(run: Run) -> None:
    wanted = ("long prefix", "swapped labels", "sliding window")
    many = [*generate("tune", run.cases(4), TUNE_SEED), *generate("held-out", run.cases(4), HELD_OUT_SEED)]
    cases = [case for case in many if case.format in wanted]
    plans = run.plans(["none", "uniform:5", "uniform:20", "pyramid:10-0", WATCHED, "canary", "guarded"])
    run.save(ttft=time_to_first_token(run.spec, cases, plans, lambda done, total: run.say("ttft", done, total)))


PARTS: dict[str, Callable[[Run], object]] = {
    "abilities": abilities,
    "calibration": calibration,
    "detector": detector_tune,
    "seeds": seeds,
    "errors": errors,
    "positions": positions,
    "resume": resume,
    "guard": guard,
    "held-out": held_out,
    "ttft": ttft,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="tiny", help="'tiny' (bundled), a checkpoint folder")
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
