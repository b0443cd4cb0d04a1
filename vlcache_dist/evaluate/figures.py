"""The figures of an evaluation in a JSON file, and what can be drawn of them: every plot comes from the file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate.plots import chart
from vlcache_dist.evaluate.targets import budget_curves


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """``{"model", "suite", "rows", ...}``."""
    path.write_text(json.dumps(figures, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote. Raises ConfigError."""
    try:
        figures = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(figures, dict) or not isinstance(figures.get("rows"), list):
        raise ConfigError(f"{path}: an object with 'rows' is wanted")
    return figures


def write_plots(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """``quality-accuracy.svg``, ``quality-kl.svg`` (against the computed share, over all formats, a point per policy)
    and, of what else the file has, ``-layers``, ``-roc``, ``-sensitivity``, ``-bands``, ``-positions``, ``-shares``,
    ``-budgets``, ``-errors``, ``-error-places``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in _PLOTS.items():
        drawing = draw(figures)
        if drawing is not None:
            path = folder / f"quality-{name}.svg"
            path.write_text(drawing)
            written.append(path)
    return written


def _against_share(figures: Mapping[str, Any], field: str, title: str, y_range: tuple[float, float] | None) -> str:
    everything = [row for row in figures["rows"] if row["format"] == "all"]
    series = {row["policy"]: [(100 * row["computed_share"], row[field])] for row in everything}
    return chart(title, "% of vision token-layers computed", field, series, lines=False, y_range=y_range)


def _accuracy(figures: Mapping[str, Any]) -> str | None:
    return _against_share(figures, "exact_match", "Exact match against computed share", (0.0, 1.0))


def _kl(figures: Mapping[str, Any]) -> str | None:
    return _against_share(figures, "kl", "KL of the first token against computed share", None)


def _layers(figures: Mapping[str, Any]) -> str | None:
    formats = [f for f in figures.get("detector", {}).get("formats", []) if "v_median_by_layer" in f]
    series = {f["format"]: list(enumerate(f["v_median_by_layer"])) for f in formats if f["suite"] == "tune"}
    title = "Deviation of fresh V from cached V at three probe tokens"
    return chart(title, "layer", "largest relative deviation (median)", series) if series else None


def _roc(figures: Mapping[str, Any]) -> str | None:
    found = figures.get("detector", {}).get("roc")
    if not found:
        return None
    series = {f"layer {n}": [(x, y) for x, y in points] for n, points in enumerate(found["by_layer"]) if n}
    title = f"Harmful reuse, {found['leading']} leading and {found['strided']} strided probes, held out"
    return chart(title, "share of harmless cases that alarm", "share of harmful cases caught", series)


def _right(figures: Mapping[str, Any], field: str, title: str, x_label: str) -> str | None:
    found = figures.get("calibration", {}).get("sensitivity")
    if not found:
        return None
    kl, none = found[field], found["kl_none"]
    series = {"this one right": list(enumerate(kl)), "nothing right": [(0, none), (len(kl) - 1, none)]}
    for one in figures.get("seeds", []):
        series[f"role changes, seed {one['seed']}"] = list(enumerate(one[field]))
    return chart(title, x_label, "KL, nats", series)


def _sensitivity(figures: Mapping[str, Any]) -> str | None:
    return _right(figures, "kl_by_fresh_layer", "KL when K and V of one layer are right", "layer")


def _bands(figures: Mapping[str, Any]) -> str | None:
    title = "KL when one eighth of each picture is computed"
    return _right(figures, "kl_by_fresh_band", title, "eighth of the tokens, first ones first")


def _positions(figures: Mapping[str, Any]) -> str | None:
    found = figures.get("positions")
    if not found:
        return None
    layer = figures.get("calibration", {}).get("detector", {}).get("layer", -1)
    series = {row["format"]: list(enumerate(row["v_by_layer_and_part"][layer])) for row in found}
    return chart(f"Error of cached V by place in the picture, layer {layer}", "part of 16", "relative error", series)


def _shares(figures: Mapping[str, Any]) -> str | None:
    rows = [row for row in figures.get("shares", []) if row["format"] == "all"]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(row["choice"], []).append((100 * row["computed_share"], row["kl"]))
    title = "KL against share, formats in which the picture's role changes"
    return chart(title, "% of vision token-layers computed", "KL, nats", series, lines=False) if series else None


def _budgets(figures: Mapping[str, Any]) -> str | None:
    try:
        curves = budget_curves(figures["rows"])
    except KeyError:
        return None
    series = {plan: list(curve.items()) for plan, curve in curves.items()}
    return chart("KL at equal budgets, formats in which it matters", "budget, %", "KL, nats", series)


def _errors(figures: Mapping[str, Any]) -> str | None:
    series = {
        f"{one['format']}, {kind}": list(enumerate(one[kind]))
        for one in figures.get("errors", {}).get("formats", [])
        for kind in ("self", "propagated")
    }
    return chart("Self and propagated error of V", "layer", "relative error", series) if series else None


def _error_places(figures: Mapping[str, Any]) -> str | None:
    series = {
        f"{one['format']}, {kind}": list(enumerate(one[f"{kind}_by_part"]))
        for one in figures.get("errors", {}).get("formats", [])
        for kind in ("self", "propagated")
    }
    title = "Self and propagated error by place in the picture, layer of the largest"
    return chart(title, "part of 16, first tokens first", "relative error", series) if series else None


_PLOTS = {
    "budgets": _budgets,
    "errors": _errors,
    "error-places": _error_places,
    "accuracy": _accuracy,
    "kl": _kl,
    "layers": _layers,
    "roc": _roc,
    "sensitivity": _sensitivity,
    "bands": _bands,
    "positions": _positions,
    "shares": _shares,
}
