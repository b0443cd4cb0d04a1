"""Tables of a page from the JSON of an evaluation: they stand between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlcache_dist.errors import ConfigError

_MAIN = ("none", "uniform:5")  #: policies that are shown by format, beside the calibrated repair and the canary
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
    repair = figures.get("calibration", {}).get("repair", {}).get("policy")
    rows = figures.get("many", figures)["rows"]
    policies = [p for p in dict.fromkeys(row["policy"] for row in rows) if p in _MAIN or p == repair or "canary" in p]
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
    seeds = sorted({row["seed"] for row in rows})
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        line = cells.setdefault(row["policy"], {})
        line[row["seed"]] = f"{row['exact_match']:.2f}, {_kl(row['kl'])}"
    head = ("policy", *(f"seed {seed}" for seed in seeds))
    return _table(head, ([f"`{name}`", *(line[seed] for seed in seeds)] for name, line in cells.items()))


def _more(figures: Mapping[str, Any]) -> str:
    rows = [row for row in figures["more_suites"] if row["format"] != "all"]
    head = ("format", "cases", "in full", "policy", "exact match", "KL", "first token agrees")
    return _table(
        head,
        (
            [r["format"], str(r["cases"]), f"{r['full_exact_match']:.3f}", f"`{r['policy']}`", *_measured(r)]
            for r in rows
        ),
    )


def _ttft(figures: Mapping[str, Any]) -> str:
    return _table(
        ("plan", "time to first token", "of full"),
        ([f"`{r['plan']}`", f"{r['ttft_ms']:.1f} ms", f"{r['ratio_to_off']:.2f}"] for r in figures["ttft"]),
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "policies": _policies,
    "formats": _formats,
    "detector": _detector,
    "sensitivity": _sensitivity,
    "repair": _repair,
    "shares": _shares,
    "more-suites": _more,
    "ttft": _ttft,
}
