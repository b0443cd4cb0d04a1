"""``vlcache-dist eval`` and ``calibrate`` as they are typed, on the smallest suites, and a plan file that serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcache_dist.cli import app
from vlcache_dist.errors import VLCacheError
from vlcache_dist.reuse.plan_file import resolve_plan


def test_eval_writes_figures_and_plots(tmp_path: Path) -> None:
    out, plots = tmp_path / "quality.json", tmp_path / "plots"
    arguments = ["--cases", "1", "--policies", "none,uniform:5", "--json", str(out), "--plots", str(plots)]
    done = CliRunner().invoke(app, ["eval", "tiny", "--suite", "held-out", "--device", "cpu", *arguments])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    formats = {row["format"] for row in rows}
    assert len(formats) > 9 and {row["policy"] for row in rows} >= {"none", "uniform:5"}
    for row in rows:
        assert 0 <= row["exact_match"] <= 1 and row["kl"] >= 0 and row["cases"] >= 1
        assert (row["computed_share"] > 0) == (row["policy"] != "none")
    assert all(path.read_text().startswith("<?xml") or "<svg" in path.read_text() for path in plots.glob("*.svg"))
    assert list(plots.glob("*.svg"))


def test_calibrate_writes_a_plan_for_its_model_only(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = CliRunner().invoke(app, ["calibrate", "tiny", "--device", "cpu", "--cases", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    model = json.loads(out.read_text())["model"]
    plan = resolve_plan(f"file:{out}", model=model, num_layers=10)
    assert plan.canary is not None
    with pytest.raises(VLCacheError, match="model"):
        resolve_plan(f"file:{out}", model="another", num_layers=10)
