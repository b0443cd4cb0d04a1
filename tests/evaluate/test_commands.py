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


def test_calibrate_writes_a_plan_for_its_model_only_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, state = tmp_path / "plan.json", tmp_path / "plan.jsonl"
    command = ["calibrate", "tiny", "--device", "cpu", "--cases", "1", "--repair", "0", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    contents = json.loads(out.read_text())
    plan = resolve_plan(f"file:{out}", model=contents["model"], num_layers=10)
    assert plan.canary is not None
    with pytest.raises(VLCacheError, match="model"):
        resolve_plan(f"file:{out}", model="another", num_layers=10)
    sensitivity = contents["provenance"]["sensitivity"]
    assert len(sensitivity["kl_by_fresh_layer"]) == 10 and len(sensitivity["kl_by_fresh_band"]) == 8
    assert sensitivity["kl_by_fresh_layer"][0] == pytest.approx(sensitivity["kl_none"], abs=1e-4)

    lines = state.read_text().splitlines(keepends=True)
    state.write_text("".join(lines[:-3]) + lines[-3][:20])  # stopped while it wrote
    out.unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads(out.read_text()) == contents
    assert sorted(state.read_text().splitlines()) == sorted("".join(lines).splitlines())
    other = CliRunner().invoke(app, [*command, "--dtype", "float32"])
    assert other.exit_code == 1 and "another dtype" in " ".join(other.output.split())
