"""Calibration: what a model's layers tell about harmful contexts, where it is sensitive, and what helps at a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate import report
from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Shown
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.report import Outcome
from vlcache_dist.evaluate.run import outcome_units, read_outcomes
from vlcache_dist.evaluate.second_pass import best_repair, choose_second_pass
from vlcache_dist.evaluate.study import read_sightings, sighting_units, statistics
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import BenchSpec, Unit, run_units
from vlcache_dist.reuse.calibrate import LimitChoice, budget_plans, least_error, limit_at, limit_choices
from vlcache_dist.reuse.canary import Again, Canary
from vlcache_dist.reuse.plan import LayerPercents, Plan
from vlcache_dist.reuse.plan_file import FORMAT

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BANDS = 8  #: parts of a picture whose sensitivity is measured
BUDGETS = (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0)  #: percent; tried in turn under a bound of KL
_PROMPTS = ("Describe the picture.", "What is written in the picture?", "What is in the middle of the picture?")
_PERCENTS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 45.0)


@dataclass(frozen=True, slots=True)
class Goal:
    """``budget``: percent of token-layers besides the probes; with ``kl_bound`` (nats) instead the least one that keeps
    the mean KL below it. ``probes``: leading, strided. The canary catches the share ``catch`` of harmful cases, or,
    with ``false_alarms``, as many as that share of alarms in harmless cases allows. ``release``: share of harmful cases
    that a second pass behind an alarm may release; None: there is none. ``repair``: percent of token-layers that a
    plan which always makes a second pass may compute; 0: none is looked for."""

    budget: float = 2.0
    kl_bound: float | None = None
    probes: tuple[int, int] = (0, 3)
    catch: float = 0.99
    false_alarms: float | None = None
    release: float | None = 0.01
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
    """Measures ``cases`` through a journal: what it holds is not measured again. ``say``: stage, done, total.
    ``bench``: does what one worker does."""

    spec: BenchSpec
    journal: Journal
    workers: int
    say: Callable[[str, int, int], None]
    bench: Workbench | None = None

    def do(self, stage: str, units: Sequence[Unit]) -> None:
        """Raises WorkerLost."""
        say = self.say
        run_units(self.spec, units, self.journal, self.workers, lambda done, total: say(stage, done, total), self.bench)

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

    def counts(
        self, cases: Sequence[Case], quiet: np.ndarray, num_layers: int, budget: float
    ) -> tuple[str, dict[str, float]]:
        """The plan with the least KL at the budget in the cases ``quiet`` bool [case, batch by batch], and the KL of
        each that was tried."""
        plans = budget_plans(num_layers, budget)
        found = self.outcomes(f"layer counts at {budget:g} %", cases, plans)
        kl = {
            name: round(float(np.mean([o.kl for o, calm in zip(outcomes, quiet, strict=True) if calm])), 6)
            for name, outcomes in found.items()
        }
        return least_error(kl), kl

    def least_harm(
        self, cases: Sequence[Case], probes: tuple[int, int], choices: Sequence[LimitChoice]
    ) -> tuple[LimitChoice, int]:
        """Of canaries the one that lets fewest wrong answers pass, the first of them, and how many. An alarm computes
        the picture that raised it and what is behind: a calm one before it can still be wrong."""
        spellings = [f"none+{Canary(*probes, ((choice.layer, choice.limit),))}" for choice in choices]
        found = self.outcomes("canary limits", cases, spellings)
        passed = [sum(outcome.harmful for outcome in found[spelling]) for spelling in spellings]
        best = int(np.argmin(passed))
        return choices[best], passed[best]

    def outcomes(self, stage: str, cases: Sequence[Case], spellings: Sequence[str]) -> dict[str, list[Outcome]]:
        """By policy, cases batch by batch."""
        self.do(stage, outcome_units(cases, spellings, self.journal))
        found: dict[str, list[Outcome]] = {}
        for outcome in read_outcomes(cases, spellings, self.journal):
            found.setdefault(outcome.policy, []).append(outcome)
        return found

    def second_pass(
        self, cases: Sequence[Case], base: str, canary: Canary, layers: Sequence[int], bound: float
    ) -> tuple[Again | None, dict[str, Any]]:
        """See ``second_pass.choose_second_pass``."""
        return choose_second_pass(partial(self.outcomes, "second pass", cases), base, canary, layers, bound)

    def repair(self, cases: Sequence[Case], layers: Sequence[int], budget: float) -> dict[str, Any]:
        """See ``second_pass.best_repair``."""
        stage = f"repair at {budget:g} %"
        return best_repair(lambda names: self.rows(stage, cases, names), layers, budget, _PERCENTS)


def calibrate(run: Calibration, cases: Sequence[Case], goal: Goal, *, model: str, num_layers: int, data: str) -> Any:
    """The contents of a plan file for ``model`` (its fingerprint): layer counts, and the canary with its second pass;
    in ``provenance`` what they rest on, the sensitivities, and the best repair. Raises ConfigError if the cases hold no
    harmful or no harmless context, since no limit follows from them, or no budget meets the bound."""
    run.do("canary", sighting_units(cases, [goal.probes], run.journal))
    values, harmful = statistics(read_sightings(cases, goal.probes, run.journal))
    try:
        choices = _limits(values, harmful, goal)
    except ValueError as error:
        raise ConfigError(f"{data}: {error}") from error
    limit, passed = run.least_harm(cases, goal.probes, choices)
    canary = Canary(*goal.probes, ((limit.layer, limit.limit),))
    quiet = values[limit.layer] <= limit.limit
    sensitivity = run.sensitivity(cases, num_layers)
    budget, (chosen, kl) = _affordable(run, cases, quiet, num_layers, goal)
    plan = Plan.parse(chosen)
    helps = np.argsort(sensitivity["kl_by_fresh_layer"], kind="stable")[:2].tolist()
    second: dict[str, Any] = {}
    if goal.release is not None:
        layers = sorted({*helps, num_layers * 4 // 5})
        again, second = run.second_pass(cases, chosen, canary, layers, goal.release)
        canary = replace(canary, again=again)
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
            "detector": asdict(limit) | {"released_harmful": passed},
            **({"second_pass": second} if second else {}),
            "budget_percent": budget,
            "kl_where_quiet": {name: float(f"{value:.4g}") for name, value in kl.items()},
            "sensitivity": sensitivity,
            **({"repair": run.repair(cases, sorted(helps), goal.repair)} if goal.repair else {}),
        },
    }


def _limits(values: np.ndarray, harmful: np.ndarray, goal: Goal) -> list[LimitChoice]:
    if goal.false_alarms is not None:
        return [limit_at(values, harmful, goal.false_alarms)]
    return limit_choices(values, harmful, goal.catch)


def _affordable(
    run: Calibration, cases: Sequence[Case], quiet: np.ndarray, num_layers: int, goal: Goal
) -> tuple[float, tuple[str, dict[str, float]]]:
    if goal.kl_bound is None:
        return goal.budget, run.counts(cases, quiet, num_layers, goal.budget)
    for budget in BUDGETS:
        chosen, kl = run.counts(cases, quiet, num_layers, budget)
        if kl[chosen] <= goal.kl_bound:
            return (0.0 if chosen == "none" else budget), (chosen, kl)
    raise ConfigError(
        f"KL bound {goal.kl_bound:g}: no plan of at most {BUDGETS[-1]:g} % keeps it where no canary alarms"
    )


def write_plan(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n")


def summary(contents: Mapping[str, Any]) -> list[str]:
    """A plan file's contents in words."""
    found = contents["provenance"]
    alarms = found["detector"]
    lines = [
        f"{found['cases']} cases, {found['harmful']} of them harmed by reuse",
        f"canary {contents['canary']}: catches {alarms['caught']:.1%} of the harm, "
        f"alarms in {alarms['false_alarms']:.1%} of the rest",
    ]
    second = found.get("second_pass")
    if second and "again" in contents["canary"]:
        lines.append(
            f"second pass: releases {second['released']} of {second['alarms']} alarms, {second['released_harmful']} of "
            f"them harmful (in truth at most {second['at_most']:.1%} of the harm); vision token-layers computed: "
            f"{second['computed_share']:.1%} of these cases' instead of {second['computed_share_without']:.1%}, "
            f"{second['computed_share_alarmed']:.1%} behind an alarm"
        )
    elif second:
        lines.append("second pass: none, it would save nothing")
    return lines
