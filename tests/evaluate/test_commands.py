"""``vlcache-dist eval`` and ``calibrate`` as they are typed, on the smallest suites, and a plan file that serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcache_dist.cli import app
from vlcache_dist.demo.pictures import draw
from vlcache_dist.errors import VLCacheError
from vlcache_dist.reuse.plan_file import resolve_plan


def test_eval_writes_figures_and_plots(tmp_path: Path) -> None:
    out, plots = tmp_path / "quality.json", tmp_path / "plots"
    arguments = ["--cases", "1", "--policies", "off,none,uniform:5,guarded", "--json", str(out), "--plots", str(plots)]
    done = CliRunner().invoke(app, ["eval", "tiny", "--suite", "held-out", "--device", "cpu", *arguments])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    formats = {row["format"] for row in rows}
    assert len(formats) > 9 and {row["policy"] for row in rows} == {"off", "none", "uniform:5", "guarded"}
    wanted = {"format", "policy", "cases", "exact_match", "full_exact_match", "kl", "computed_share", "escalated_share"}
    for row in rows:
        assert wanted <= row.keys() and 0 <= row["escalated_share"] <= 1
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


def test_eval_times_what_the_engine_serves(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(draw("form", 3).png())
    line = {"question": "What is the value of QF?", "image": "pictures/a.png", "answer": "17"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "quality.json"
    arguments = ["--policies", "off,none,last:5,guarded", "--ttft", "1", "--json", str(out), "--device", "cpu"]
    done = CliRunner().invoke(app, ["eval", "tiny", "--suite", str(tmp_path), *arguments])
    assert done.exit_code == 0, done.output
    times = {row["plan"]: row["ttft_ms"] for row in json.loads(out.read_text())["ttft"]}
    assert set(times) == {"off", "none", "guarded"} and all(ms > 0 for ms in times.values())
    assert "ms to first token" in done.output
