"""What the default plan is held to, and what the committed figures say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUDGETS = (5, 10, 20, 50)  #: percent
RIVALS = ("uniform", "blend")
_NO_HARM = 0.01  #: nats; a format in which reuse without recomputation stays below it, and loses no answer, is harmless
_FLAT = 0.01  #: nats by which first-k's KL must vary between the budgets, else they say nothing about plans

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is wanted, as text, the one that was found, and whether that will do."""

    name: str
    wanted: str
    found: str
    met: bool


def by_policy(rows: Rows, policy: str) -> dict[str, Mapping[str, Any]]:
    """A policy's rows by format, the one over all left out. Raises KeyError if there are none."""
    found = {row["format"]: row for row in rows if row["policy"] == policy and row["format"] != "all"}
    if not found:
        raise KeyError(policy)
    return found


def harmless_formats(rows: Rows) -> list[str]:
    """Formats in which reuse without any recomputation changes nothing."""
    return [
        name
        for name, row in by_policy(rows, "none").items()
        if row["kl"] < _NO_HARM and row["exact_match"] >= row["full_exact_match"]
    ]


def budget_curves(rows: Rows) -> dict[str, dict[int, float]]:
    """Mean KL by budget of first-k, CacheBlend-style and calibrated plans over the formats in which first-k's KL
    varies with the budget."""
    first_k = {budget: by_policy(rows, f"uniform:{budget}") for budget in BUDGETS}
    spread = {name: np.ptp([first_k[budget][name]["kl"] for budget in BUDGETS]) for name in first_k[BUDGETS[0]]}
    formats = [name for name, width in spread.items() if width >= _FLAT]
    return {
        plan: {
            budget: float(np.mean([by_policy(rows, f"{plan}:{budget}")[name]["kl"] for name in formats]))
            for budget in BUDGETS
        }
        for plan in (*RIVALS, "calibrated")
    }


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """Raises KeyError for figures that are not there."""
    return [
        *_answers(figures["many"]["rows"]),
        *_detector(figures["detector"]["verdicts"]["guarded"]),
        *_plans(figures),
    ]


def _answers(rows: Rows) -> Iterator[Target]:
    guarded = by_policy(rows, "guarded")
    lost = {name: row["full_exact_match"] - row["exact_match"] for name, row in guarded.items()}
    worst = max(lost, key=lambda name: lost[name])
    most = lost[worst]
    where = f" ({worst})" if most > 0 else ""
    yield Target("exact match lost in any format", "at most 1 point", f"{100 * most:.1f} points{where}", most <= 0.01)
    agreement = next(row for row in rows if row["policy"] == "guarded" and row["format"] == "all")
    share = agreement["first_token_agreement"]
    found = f"{100 * share:.1f} % of {agreement['cases']}"
    yield Target("first token agrees with a full run's", "at least 99 %", found, share >= 0.99)
    harmless = harmless_formats(rows)
    computed = {name: row["computed_share"] for name, row in guarded.items()}
    worst = max(harmless, key=lambda name: computed[name])
    mean = float(np.mean([computed[name] for name in harmless]))
    found = f"{100 * mean:.1f} %; most: {100 * computed[worst]:.1f} % ({worst})"
    yield Target("vision tokens computed in the harmless formats", "at most 5 %", found, mean <= 0.05)
    mean = float(np.mean([share for name, share in computed.items() if name not in harmless]))
    yield Target("on average in the harmful formats", "less than 100 %", f"{100 * mean:.1f} %", mean < 1)


def _detector(found: Mapping[str, Any]) -> Iterator[Target]:
    caught = f"{100 * found['caught']:.1f} % of {found['harmful']} in {found['cases']} cases"
    met = found["caught"] >= 0.99 and found["cases"] >= 1000
    yield Target("harmful reuse caught or repaired", "at least 99 %, 1,000 cases", caught, met)
    alarms = found["false_alarms"]
    yield Target("harmless reuse computed in full", "at most 5 %", f"{100 * alarms:.1f} %", alarms <= 0.05)


def _plans(figures: Mapping[str, Any]) -> Iterator[Target]:
    curves = budget_curves(figures["rows"])
    for rival in RIVALS:
        less = {b: 1 - curves["calibrated"][b] / max(curves[rival][b], 1e-9) for b in BUDGETS}
        found = ", ".join(f"{100 * share:.0f} % at {budget} %" for budget, share in less.items())
        name = f"calibrated at the budget of `{rival}`: less KL"
        yield Target(name, "at least 25 %", found, min(less.values()) >= 0.25)
    if "guard" in figures:
        guard = figures["guard"]
        late, runs = guard["failing"]["late"], guard["failing"]["runs"]
        found = f"{runs - late} of {runs} runs, median {guard['failing']['median']}"
        yield Target("guard: a plan that fails half is noticed", "within 200 requests", found, late <= runs // 100)
        tripped, runs = guard["healthy"]["tripped"], guard["healthy"]["runs"]
        found = f"{tripped} of {runs} runs"
        yield Target("guard: trips in 10,000 healthy requests", "none", found, tripped == 0)
