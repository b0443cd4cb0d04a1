"""Calibration: what a model's layers tell about harmful contexts, where it is sensitive, and what helps at a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate import report
from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Shown, batches
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.run import outcome_units, read_outcomes
from vlcache_dist.evaluate.study import read_sightings, sighting_units, statistics
from vlcache_dist.evaluate.workers import BenchSpec, Unit, run_units
from vlcache_dist.reuse.calibrate import LimitChoice, budget_plans, choose_limit, least_error, limit_at
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.plan import LayerPercents, Plan
from vlcache_dist.reuse.plan_file import FORMAT

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BANDS = 8  #: parts of a picture whose sensitivity is measured
BUDGETS = (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0)  #: percent; tried in turn under a bound of KL
_PROMPTS = ("Describe the picture.", "What is written in the picture?", "What is in the middle of the picture?")
_PERCENTS = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0)


@dataclass(frozen=True, slots=True)
class Goal:
    """``budget``: percent of token-layers besides the probes; with ``kl_bound`` (nats) instead the least one that keeps
    the mean KL below it. ``probes``: leading, strided. The canary catches the share ``catch`` of harmful cases, or,
    with ``false_alarms``, as many as that share of alarms in harmless cases allows. ``repair``: percent of token-layers
    that a repair of harmful contexts may compute; 0: none is looked for."""

    budget: float = 2.0
    kl_bound: float | None = None
    probes: tuple[int, int] = (0, 3)
    catch: float = 0.99
    false_alarms: float | None = None
    repair: float = 5.0


def contexts(folder: Path, prompts: Sequence[str] = _PROMPTS) -> list[Case]:
    """A user's pictures in contexts that change their role and in contexts that do not. There are no right answers:
    harm is KL alone. Raises ConfigError if there are fewer than two pictures."""
    pictures = [Shown(path=str(p)) for p in sorted(folder.iterdir()) if p.suffix.lower() in PICTURES]
    if len(pictures) < 2 or not prompts:
        raise ConfigError(f"{folder}: at least two pictures and one prompt are needed, {len(pictures)} pictures found")
    cases = []
    for i, picture in enumerate(pictures):
        other, question = pictures[i - 1], prompts[i % len(prompts)]
        alone = Donor(Dialogue.user(picture, prompts[(i + 1) % len(prompts)]), 0)
        pair = Dialogue.user("Picture 1: ", other, "\nPicture 2: ", picture, f"About picture 2: {question}")
        swap = Dialogue.user("Picture 1: ", picture, "\nPicture 2: ", other, question)
        system = Dialogue.user(picture, question, system="You answer in one short sentence.")
        first = Dialogue.user(question + "\n", picture)
        cases += [
            Case("other system prompt", system, (), (alone,)),
            Case("question first", first, (), (alone,)),
            Case("second of two", pair, (), (Donor(Dialogue.user(other, question), 0), alone)),
            Case("swapped", pair, (), (Donor(swap, 1), Donor(swap, 0))),
        ]
    return sorted(cases, key=lambda case: case.format)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measures ``cases`` through a journal: what it holds is not measured again. ``say``: stage, done, total."""

    spec: BenchSpec
    journal: Journal
    workers: int
    say: Callable[[str, int, int], None]

    def do(self, stage: str, units: Sequence[Unit]) -> None:
        """Raises WorkerLost."""
        run_units(self.spec, units, self.journal, self.workers, lambda done, total: self.say(stage, done, total))

    def rows(self, stage: str, cases: Sequence[Case], policies: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Means over all cases, by policy."""
        self.do(stage, outcome_units(cases, policies, self.journal))
        found = report.rows(read_outcomes(cases, policies, self.journal))
        return {row["policy"]: row for row in found if row["format"] == "all"}

    def sensitivity(self, cases: Sequence[Case], num_layers: int) -> dict[str, Any]:
        """KL that is left when one layer's K and V of a picture are right, or one part of its tokens."""
        layers, bands = [f"layer:{n}" for n in range(num_layers)], [f"band:{i}/{BANDS}" for i in range(BANDS)]
        rows = self.rows("sensitivity", cases, ["none", *layers, *bands])
        return {
            "kl_none": rows["none"]["kl"],
            "kl_by_fresh_layer": [rows[name]["kl"] for name in layers],
            "kl_by_fresh_band": [rows[name]["kl"] for name in bands],
        }

    def counts(self, cases: Sequence[Case], num_layers: int, budget: float) -> tuple[str, dict[str, float]]:
        """The plan with the least KL at the budget, and the KL of each that was tried."""
        plans = budget_plans(num_layers, budget)
        kl = {name: row["kl"] for name, row in self.rows(f"layer counts at {budget:g} %", cases, plans).items()}
        return least_error(kl), kl

    def repair(self, cases: Sequence[Case], layers: Sequence[int], budget: float) -> dict[str, Any]:
        """The best policy that also chooses tokens by attention in one of ``layers``, or shifts, and computes at most
        ``budget`` percent (and one token, as no picture can have less), beside first-k and CacheBlend-style."""
        percents = [p for p in _PERCENTS if p <= budget]
        tried = [f"shift:{k}" for k in (1, 2, 3)]
        tried += [f"attend:{p:g}@{layer}{more}" for p in percents for layer in layers for more in ("", "+shift:1")]
        compared = [f"uniform:{budget:g}", f"blend:{budget:g}"]
        rows = self.rows(f"repair at {budget:g} %", cases, ["none", *tried, *compared])
        room = rows[compared[0]]["computed_share"]
        affordable = {name: rows[name]["kl"] for name in tried if rows[name]["computed_share"] <= room + 1e-9}
        best = min(affordable, key=lambda name: affordable[name]) if affordable else "none"
        shown = ("kl", "exact_match", "computed_share")
        return {"policy": best, **{name: {k: rows[name][k] for k in shown} for name in (best, "none", *compared)}}


def calibrate(run: Calibration, cases: Sequence[Case], goal: Goal, *, model: str, num_layers: int, data: str) -> Any:
    """The contents of a plan file for ``model`` (its fingerprint): layer counts and canary, which the engine serves,
    and in ``provenance`` the sensitivities and the best repair, which only the evaluation has so far. Raises
    ConfigError if the cases hold no harmful or no harmless context, since no limit follows from them, or no budget
    meets the bound."""
    run.do("canary", sighting_units(cases, [goal.probes], run.journal))
    values, harmful = statistics(read_sightings(cases, goal.probes, run.journal))
    try:
        limit = _limit(values, harmful, goal)
    except ValueError as error:
        raise ConfigError(f"{data}: {error}") from error
    canary = Canary(*goal.probes, ((limit.layer, limit.limit),))
    in_order = [case for _, _, batch in batches(cases) for case in batch]
    quiet = [case for case, value in zip(in_order, values[limit.layer], strict=True) if value <= limit.limit]
    sensitivity = run.sensitivity(cases, num_layers)
    budget, (chosen, kl) = _affordable(run, quiet, num_layers, goal)
    plan = Plan.parse(chosen)
    helps = np.argsort(sensitivity["kl_by_fresh_layer"], kind="stable")[:2].tolist()
    return {
        "format": FORMAT,
        "model": model,
        "num_layers": num_layers,
        "percents": [float(p) for p in plan.percents] if isinstance(plan, LayerPercents) else [0.0] * num_layers,
        "canary": str(canary).removeprefix("canary:"),
        "provenance": {
            "data": data,
            "cases": len(cases),
            "harmful": int(harmful.sum()),
            "goal": asdict(goal),
            "detector": asdict(limit),
            "budget_percent": budget,
            "kl_where_quiet": {name: float(f"{value:.4g}") for name, value in kl.items()},
            "sensitivity": sensitivity,
            **({"repair": run.repair(cases, sorted(helps), goal.repair)} if goal.repair else {}),
        },
    }


def _limit(values: np.ndarray, harmful: np.ndarray, goal: Goal) -> LimitChoice:
    if goal.false_alarms is not None:
        return limit_at(values, harmful, goal.false_alarms)
    return choose_limit(values, harmful, goal.catch)


def _affordable(
    run: Calibration, quiet: Sequence[Case], num_layers: int, goal: Goal
) -> tuple[float, tuple[str, dict[str, float]]]:
    if goal.kl_bound is None:
        return goal.budget, run.counts(quiet, num_layers, goal.budget)
    for budget in BUDGETS:
        chosen, kl = run.counts(quiet, num_layers, budget)
        if kl[chosen] <= goal.kl_bound:
            return (0.0 if chosen == "none" else budget), (chosen, kl)
    raise ConfigError(
        f"KL bound {goal.kl_bound:g}: no plan of at most {BUDGETS[-1]:g} % keeps it where no canary alarms"
    )


def write_plan(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n")
