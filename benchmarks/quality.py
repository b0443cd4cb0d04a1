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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlcache_dist.evaluate import cli, detector, report
from vlcache_dist.evaluate.calibration import Calibration, Goal, calibrate
from vlcache_dist.evaluate.cases import Case
from vlcache_dist.evaluate.figures import write_json
from vlcache_dist.evaluate.generated import generate
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.positions import position_units, read_positions
from vlcache_dist.evaluate.run import outcome_units, read_outcomes
from vlcache_dist.evaluate.study import read_sightings, sighting_units
from vlcache_dist.evaluate.ttft import time_to_first_token
from vlcache_dist.evaluate.workers import BenchSpec, Unit, run_units

TUNE_SEED, HELD_OUT_SEED = 0, 1000
ROLE_CHANGES = ("swapped labels", "alone, then one of two")
PROBE_SETS = [(0, 3)]
CANARY = "none+canary:0,3,5<0.5"
POLICIES = ["full", "none", "unrotated", "mpic:4", "shift:1", "shift:3", "pyramid:10-0", "inverse:0-10"] + [
    f"{name}:{percent}" for percent in (5, 20) for name in ("uniform", "random", "last", "blend", "epic")
]


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
        self.do(part, outcome_units(cases, policies, journal), journal)
        return report.rows(read_outcomes(cases, policies, journal))

    def repair(self) -> list[str]:
        """The policy that calibration found best, where it ran."""
        found = self.figures.get("calibration", {}).get("repair", {}).get("policy")
        return [found] if found else []

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
    run.save(calibration={"canary": contents["canary"], "percents": contents["percents"], **contents["provenance"]})


def policies(run: Run) -> None:
    cases = generate("held-out", run.cases(32), HELD_OUT_SEED)
    rows = run.rows("policies", cases, [*POLICIES, *run.repair(), CANARY])
    run.save(suite="held-out", seed=HELD_OUT_SEED, rows=rows)


def many(run: Run) -> None:
    """The policies that matter over 1,008 cases."""
    cases = generate("held-out", run.cases(84), HELD_OUT_SEED + 1)
    rows = run.rows("many", cases, ["none", "uniform:5", *run.repair(), CANARY])
    run.save(many={"seed": HELD_OUT_SEED + 1, "rows": rows})


def detectors(run: Run) -> None:
    tune = generate("tune", run.cases(64), TUNE_SEED + 1)
    held = generate("held-out", run.cases(84), HELD_OUT_SEED + 2)
    found = []
    for part, cases in (("detector-tune", tune), ("detector-held-out", held)):
        journal = run.journal(part, cases)
        run.do(part, sighting_units(cases, PROBE_SETS, journal), journal)
        found.append({probes: read_sightings(cases, probes, journal) for probes in PROBE_SETS})
    run.save(detector=detector.figures(*found))


def more_suites(run: Run) -> None:
    rows = []
    for suite in ("sizes", "multi-hop"):
        cases = generate(suite, run.cases(32), HELD_OUT_SEED)
        found = run.rows(suite, cases, ["none", "uniform:5", *run.repair(), CANARY])
        rows += [{"suite": suite, **row} for row in found]
    run.save(more_suites=rows)


def shares(run: Run) -> None:
    """First, last, random tokens at growing shares, where a picture changes its role: do early tokens matter most?"""
    names = [f"{choice}:{share}" for choice in ("uniform", "last", "random") for share in (5, 20, 50)]
    rows = []
    for seed in (TUNE_SEED + 10, TUNE_SEED + 11, TUNE_SEED + 12):
        cases = [c for c in generate("tune", run.cases(16), seed) if c.format in ROLE_CHANGES]
        for row in run.rows(f"shares-{seed}", cases, [*names, *run.repair()]):
            rows.append({"seed": seed, "choice": row["policy"].partition(":")[0], **row})
    run.save(shares=rows)


def positions(run: Run) -> None:
    cases = generate("tune", run.cases(32), TUNE_SEED)
    journal = run.journal("positions", cases)
    run.do("positions", position_units(cases, journal), journal)
    run.save(positions=read_positions(cases, journal))


def ttft(run: Run) -> None:
    wanted = ("long prefix", "swapped labels", "sliding window")
    many = [*generate("tune", run.cases(4), TUNE_SEED), *generate("held-out", run.cases(4), HELD_OUT_SEED)]
    cases = [case for case in many if case.format in wanted]
    plans = ["none", "uniform:5", "uniform:20", "pyramid:10-0", "none+canary:0,3,5<1000", CANARY]
    run.save(ttft=time_to_first_token(run.spec, cases, plans, lambda done, total: run.say("ttft", done, total)))


PARTS: dict[str, Callable[[Run], None]] = {
    "calibration": calibration,
    "policies": policies,
    "detector": detectors,
    "more-suites": more_suites,
    "shares": shares,
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
