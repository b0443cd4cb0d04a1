"""The committed results have what they are asked for, and targets are judged as they are worded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlcache_dist.evaluate.figures import read_json
from vlcache_dist.evaluate.generated import SUITES
from vlcache_dist.evaluate.targets import BUDGETS, budget_curves, harmless_formats, targets

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quality-tiny.json"
KEYS = {"format", "policy", "cases", "exact_match", "full_exact_match", "kl", "computed_share", "escalated_share"}


def row(policy: str, format_: str, **changes: Any) -> dict[str, Any]:
    plain = {"exact_match": 1.0, "full_exact_match": 1.0, "kl": 0.0, "computed_share": 0.04, "escalated_share": 0.0}
    return plain | {"format": format_, "policy": policy, "cases": 600, "first_token_agreement": 1.0} | changes


def figures(**guarded: Any) -> dict[str, Any]:
    curve = [
        row(f"{plan}:{budget}", name, kl=kl * (name == "harmful") * (100 - budget))
        for plan, kl in (("uniform", 0.04), ("blend", 0.05), ("calibrated", 0.02))
        for budget in BUDGETS
        for name in ("calm", "harmful")
    ]
    many = [
        row("none", "calm"),
        row("none", "harmful", kl=2.0, exact_match=0.5),
        row("guarded", "calm"),
        row("guarded", "harmful", **({"computed_share": 0.6} | guarded)),
        row("guarded", "all"),
    ]
    found = {"caught": 1.0, "harmful": 200, "cases": 1000, "false_alarms": 0.02}
    return {"rows": curve, "many": {"rows": many}, "detector": {"verdicts": {"guarded": found}}}


def missed(what: dict[str, Any]) -> list[str]:
    return [target.name for target in targets(what) if not target.met]


def test_targets_are_met_or_missed_by_what_they_say() -> None:
    assert missed(figures()) == []
    assert missed(figures(exact_match=0.98)) == ["exact match lost in any format"]
    assert missed(figures(computed_share=1.01)) == ["on average in the harmful formats"]
    dear = figures()
    dear["many"]["rows"][2]["computed_share"] = 0.06
    assert missed(dear) == ["vision tokens computed in the harmless formats"]
    few = figures()
    few["detector"]["verdicts"]["guarded"] |= {"cases": 999, "false_alarms": 0.06}
    assert missed(few) == ["harmful reuse caught or repaired", "harmless reuse computed in full"]
    late = figures() | {
        "guard": {"failing": {"runs": 100, "late": 2, "median": 50}, "healthy": {"runs": 9, "tripped": 1}}
    }
    assert len(missed(late)) == 2


def test_budgets_are_compared_where_they_matter() -> None:
    curves = budget_curves(figures()["rows"])
    assert curves["uniform"][50] == pytest.approx(2.0) and curves["calibrated"][5] == pytest.approx(1.9)
    close = figures()
    for one in close["rows"]:
        if one["policy"] == "calibrated:20":
            one["kl"] *= 1.6
    assert missed(close) == ["calibrated at the budget of `uniform`: less KL"]


def test_the_committed_results_cover_every_held_out_format_and_budget() -> None:
    committed = read_json(RESULTS)
    many = committed["many"]["rows"]
    assert all(one.keys() >= KEYS for one in (*committed["rows"], *many))
    for policy in ("none", "guarded"):
        formats = {one["format"] for one in many if one["policy"] == policy}
        assert formats == {*SUITES["held-out"], "all"}
    assert committed["detector"]["verdicts"]["guarded"]["cases"] >= 1000 <= committed["detector"]["cases_held_out"]
    assert harmless_formats(many) and all(
        curve.keys() == set(BUDGETS) for curve in budget_curves(committed["rows"]).values()
    )
    assert targets(committed)
