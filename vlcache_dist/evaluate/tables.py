"""Tables of a page from the JSON of an evaluation: they stand between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate.targets import BUDGETS, budget_curves, targets

_MAIN = ("none", "uniform:5", "calibrated:5", "canary", "guarded")  #: policies that are shown by format
_PLACE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, figures: Mapping[str, Any]) -> str:
    """The page with its tables made anew. Raises ConfigError for a table that nobody knows, or whose figures the JSON
    lacks."""

    def table(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise ConfigError(f"table {name!r}: known are {', '.join(TABLES)}")
        try:
            return found[1] + TABLES[name](figures) + found[3]
        except KeyError as error:
            raise ConfigError(f"table {name!r}: the figures have no {error}") from error

    return _PLACE.sub(table, page)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _kl(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.1g}" if value >= 1e-5 else "0"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _measured(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['exact_match']:.3f}", _kl(row["kl"]), f"{row['first_token_agreement']:.3f}"]


def _policies(figures: Mapping[str, Any]) -> str:
    rows = [row for row in figures["rows"] if row["format"] == "all"]
    full = next(row["flops"] for row in rows if row["policy"] == "full")
    head = ("policy", "exact match", "KL", "first token agrees", "token-layers computed", "FLOPs of full")
    return _table(
        head,
        ([f"`{r['policy']}`", *_measured(r), _percent(r["computed_share"]), _percent(r["flops"] / full)] for r in rows),
    )


def _formats(figures: Mapping[str, Any]) -> str:
    rows = figures.get("many", figures)["rows"]
    policies = [p for p in _MAIN if any(row["policy"] == p for row in rows)]
    rows = [row for row in rows if row["policy"] in policies]
    cells: dict[str, list[str]] = {}
    for row in rows:
        line = cells.setdefault(row["format"], [f"{row['full_exact_match']:.3f}"])
        line.append(f"{row['exact_match']:.3f}, {_kl(row['kl'])}, {_percent(row['computed_share'])}")
    return _table(["format", "full", *(f"`{p}`" for p in policies)], ([name, *line] for name, line in cells.items()))


def _detector(figures: Mapping[str, Any]) -> str:
    head = ("probes", "layer, limit", "harmful", "caught", "false alarms", "in harmless formats", "area, best layer")
    return _table(
        head,
        (
            [
                f"{s['leading']} leading, {s['strided']} strided",
                f"{s['layer']}, {s['limit']:.2f}",
                str(s["held_out_harmful"]),
                _percent(s["held_out_caught"]),
                _percent(s["held_out_false_alarms"]),
                _percent(s["held_out_false_alarms_in_harmless_formats"]),
                f"{max(s['auc_by_layer_V_max']):.3f}",
            ]
            for s in figures["detector"]["probe_sets"]
        ),
    )


def _verdicts(figures: Mapping[str, Any]) -> str:
    head = (
        "plan",
        "cases",
        "harmful",
        "alarm in these",
        "repaired",
        "released",
        "alarm in harmless",
        "computed in full",
    )
    return _table(
        head,
        (
            [
                f"`{name}`",
                str(v["cases"]),
                str(v["harmful"]),
                str(v["alarmed_harmful"]),
                str(v["repaired"]),
                str(v["released_harmful"]),
                _percent(v["alarms_in_harmless"]),
                _percent(v["false_alarms"]),
            ]
            for name, v in figures["detector"]["verdicts"].items()
        ),
    )


def _targets(figures: Mapping[str, Any]) -> str:
    lines = ([t.name, t.wanted, t.found, "met" if t.met else "**missed**"] for t in targets(figures))
    return _table(("target", "wanted", "reached", ""), lines)


def _budgets(figures: Mapping[str, Any]) -> str:
    curves = budget_curves(figures["rows"])
    return _table(
        ("KL at a budget of", *(f"{budget} %" for budget in BUDGETS)),
        ([f"`{plan}`", *(_kl(curve[budget]) for budget in BUDGETS)] for plan, curve in curves.items()),
    )


def _second_pass(figures: Mapping[str, Any]) -> str:
    found = figures["calibration"]["second_pass"]
    head = ("second pass", "alarms released", "of them harmful", "token-layers computed, all cases")
    lines = [
        [f"`{one['again']}`", str(one["released"]), str(one["released_harmful"]), _percent(one["computed_share"])]
        for one in found["tried"]
    ]
    return _table(head, [["none", "0", "0", _percent(found["computed_share_without"])], *lines])


def _seeds(figures: Mapping[str, Any]) -> str:
    found = figures["seeds"]
    parts = [[one[what] for one in found] for what in ("kl_by_fresh_layer", "kl_by_fresh_band")]
    head = ["right in the picture's KV", *(str(n) for n in range(max(len(part[0]) for part in parts)))]
    lines = []
    for name, seeds in zip(("layer", "eighth of the tokens"), parts, strict=True):
        line = [_spread(values) for values in zip(*seeds, strict=True)]
        lines.append([name, *line, *[""] * (len(head) - 1 - len(line))])
    nothing = _spread([one["kl_none"] for one in found])
    return _table(head, [*lines, ["nothing", nothing, *[""] * (len(head) - 2)]])


def _errors(figures: Mapping[str, Any]) -> str:
    formats = figures["errors"]["formats"]
    kinds = ("self", "propagated", "cumulative")
    return _table(
        ("context", "", *(f"l{layer}" for layer in range(1, len(formats[0]["self"])))),
        (
            [f["format"] if kind == "self" else "", kind, *(f"{value:.2f}" for value in f[kind][1:])]
            for f in formats
            for kind in kinds
        ),
    )


def _error_plans(figures: Mapping[str, Any]) -> str:
    rows = figures["errors"]["plans"]
    head = ("", *(f"`{row['policy']}`" for row in rows))
    lines = [["cumulative error", *(f"{row['cumulative']:.2f}" for row in rows)], ["KL", *(_kl(r["kl"]) for r in rows)]]
    return _table(head, lines)


def _spread(values: Sequence[float]) -> str:
    """Mean, and in brackets the smallest and the largest."""
    return f"{_kl(sum(values) / len(values))} ({_kl(min(values))}-{_kl(max(values))})"


def _sensitivity(figures: Mapping[str, Any]) -> str:
    found = figures["calibration"]["sensitivity"]
    layers, bands = found["kl_by_fresh_layer"], found["kl_by_fresh_band"]
    head = ["right in the picture's KV", *(str(n) for n in range(max(len(layers), len(bands))))]
    lines = (["layer", *map(_kl, layers)], ["eighth of the tokens", *map(_kl, bands)])
    return _table(head, ([*line, *[""] * (len(head) - len(line))] for line in lines))


def _repair(figures: Mapping[str, Any]) -> str:
    found = figures["calibration"]["repair"]
    return _table(
        ("policy", "exact match", "KL", "token-layers computed"),
        (
            [f"`{name}`", f"{row['exact_match']:.3f}", _kl(row["kl"]), _percent(row["computed_share"])]
            for name, row in found.items()
            if name != "policy"
        ),
    )


def _shares(figures: Mapping[str, Any]) -> str:
    rows = [row for row in figures["shares"] if row["format"] == "all"]
    by_policy: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], []).append(row)
    lines = (
        [
            f"`{name}`",
            *(_spread([row[what] for row in group]) for what in ("exact_match", "kl", "first_token_agreement")),
        ]
        for name, group in by_policy.items()
    )
    return _table(("policy", "exact match", "KL", "first token agrees"), lines)


def _resume(figures: Mapping[str, Any]) -> str:
    by_format: dict[str, dict[str, float]] = {}
    for row in figures["resume"]:
        by_format.setdefault(row["format"], {})[row["policy"].removeprefix("resume:")] = row["kl"]
    boundaries = [name for name in next(iter(by_format.values())) if name != "none"]
    lines = [[name, *(_kl(kl[one]) for one in (*boundaries, "none"))] for name, kl in by_format.items()]
    return _table(("KL, resumed at layer", *boundaries, "not at all"), lines)


def _abilities(figures: Mapping[str, Any]) -> str:
    rows = figures["abilities"]
    halves = {row["format"]: row["full_exact_match"] for row in rows}
    families = dict.fromkeys(name.rpartition(", ")[0] for name in halves if name.endswith((", after", ", before")))
    lines = [[name, f"{halves[f'{name}, after']:.2f}", f"{halves[f'{name}, before']:.2f}"] for name in families]
    others = [[row["format"], f"{row['full_exact_match']:.2f}", ""] for row in rows if row["suite"] != "abilities"]
    return _table(("question", "behind the picture", "before it"), [*lines, *others])


def _ttft(figures: Mapping[str, Any]) -> str:
    return _table(
        ("plan", "time to first token", "of full"),
        ([f"`{r['plan']}`", f"{r['ttft_ms']:.1f} ms", f"{r['ratio_to_off']:.2f}"] for r in figures["ttft"]),
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "targets": _targets,
    "budgets": _budgets,
    "verdicts": _verdicts,
    "second-pass": _second_pass,
    "seeds": _seeds,
    "errors": _errors,
    "error-plans": _error_plans,
    "policies": _policies,
    "formats": _formats,
    "detector": _detector,
    "sensitivity": _sensitivity,
    "repair": _repair,
    "shares": _shares,
    "resume": _resume,
    "abilities": _abilities,
    "ttft": _ttft,
}
