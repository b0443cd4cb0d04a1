"""The table of targets says what reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlcache_dist.bench.targets import TARGETS, Verdict, table, verdicts

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_reports_that_are_there() -> None:
    """Reports of this tree are found under the names that the targets give and have the fields they read."""
    found = {verdict.what: verdict for verdict in verdicts(RESULTS, "h200")}
    engine = {r["vision_tokens"]: r for r in json.loads((RESULTS / "ttft-7b-h200.json").read_text())["rows"]}
    for tokens, row in engine.items():
        assert found[f"warm over its floor, {tokens:,}"].measured == pytest.approx(
            row["warm_ms"] / row["warm_floor_ms"]
        )
        ahead = found[f"cold, ahead of transformers, {tokens:,}"].measured
        assert ahead == pytest.approx(row["transformers_ms"] / row["cold_ms"])
    missing = {what for what, verdict in found.items() if verdict.state == "not measured"}
    assert all("compiled vLLM" in what for what in missing)


def test_every_target_follows_its_report(tmp_path: Path) -> None:
    """A report twice as large in all its figures, or absent, changes every verdict that reads it."""
    names = {stem.format(gpu="h200") for target in TARGETS for stem in target.files}
    for name in names:
        file = RESULTS / f"{name}.json"
        if file.exists():
            (tmp_path / file.name).write_text(file.read_text())
    before = verdicts(tmp_path, "h200")
    for target, verdict in zip(TARGETS, before, strict=True):
        if verdict.measured is None:
            continue
        first = tmp_path / f"{target.files[0].format(gpu='h200')}.json"
        kept = first.read_text()
        first.unlink()
        assert verdicts(tmp_path, "h200")[TARGETS.index(target)].state == "not measured", target.what
        first.write_text(json.dumps({"rows": [], "decode": [], "by_image": [], "load_s": [0.0], "stalls": 7,
                                     "image": {"median_us": 9e9}}))  # fmt: skip
        assert verdicts(tmp_path, "h200")[TARGETS.index(target)].measured != verdict.measured, target.what
        first.write_text(kept)


@pytest.mark.parametrize(
    ("measured", "at_most", "state"),
    [
        (1.0, True, "met"),
        (1.1, True, "missed"),
        (1.0, False, "met"),
        (0.9, False, "missed"),
        (None, True, "not measured"),
    ],
)
def test_states(measured: float | None, at_most: bool, state: str) -> None:
    verdict = Verdict("a figure", 1.0, at_most, measured)
    assert verdict.state == state
    assert f"| {state} |" in table([verdict]) and ("<= 1" if at_most else ">= 1") in table([verdict])
