"""Calibration: what a model's layers tell about harmful contexts, and which small plan helps where it is quiet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Shown, by_format
from vlcache_dist.evaluate.policies import parse_policy
from vlcache_dist.evaluate.run import evaluate
from vlcache_dist.evaluate.study import Sighting, sight
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.reuse.calibrate import budget_plans, choose_limit, least_error
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.plan import LayerPercents, Plan
from vlcache_dist.reuse.plan_file import FORMAT

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PROMPTS = ("Describe the picture.", "What is written in the picture?", "What is in the middle of the picture?")


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


def statistics(sightings: Sequence[Sighting]) -> tuple[np.ndarray, np.ndarray]:
    """The canary's statistic fp32 [layer, case], and bool [case]: was the reuse harmful."""
    values = np.stack([np.nanmax(s.ratios[:, 1], axis=(0, 2)) for s in sightings], 1)
    return values, np.array([s.harmful for s in sightings])


def calibrate(
    bench: Workbench,
    cases: Sequence[Case],
    *,
    budget: float,
    probes: tuple[int, int],
    catch: float,
    data: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The contents of a plan file. ``budget``: percent of token-layers besides the probes. Raises ConfigError if the
    cases hold no harmful or no harmless context, since no limit follows from them."""
    found = sight(bench, cases, [probes], say)[probes]
    values, harmful = statistics(found)
    try:
        limit = choose_limit(values, harmful, catch)
    except ValueError as error:
        raise ConfigError(f"{data}: {error}") from error
    canary = Canary(*probes, ((limit.layer, limit.limit),))
    quiet = [case for case, value in zip(_in_order(cases), values[limit.layer], strict=True) if value <= limit.limit]
    kl: dict[str, float] = {}
    layers = bench.dense.num_layers
    for spelling in budget_plans(layers, budget):

        def told(name: str, done: int, total: int, spelling: str = spelling) -> None:
            say(f"{spelling}: {name}")

        outcomes = evaluate(bench, quiet, [parse_policy(spelling)], told)
        kl[spelling] = float(np.mean([o.kl for o in outcomes]))
    chosen = least_error(kl)
    plan = Plan.parse(chosen)
    percents = [float(p) for p in plan.percents] if isinstance(plan, LayerPercents) else [0.0] * layers
    return {
        "format": FORMAT,
        "model": bench.fingerprint,
        "num_layers": layers,
        "percents": percents,
        "canary": str(canary).removeprefix("canary:"),
        "provenance": {
            "data": data,
            "cases": len(cases),
            "harmful": int(harmful.sum()),
            "budget_percent": budget,
            "detector": asdict(limit),
            "kl_where_quiet": {name: float(f"{value:.4g}") for name, value in kl.items()},
        },
    }


def write_plan(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n")


def _in_order(cases: Sequence[Case]) -> list[Case]:
    """As ``sight`` lists them: format by format."""
    return [case for group in by_format(cases).values() for case in group]
