"""The TTFT benchmark runs anywhere and reports what it says."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from vlcache_dist.cli import app


def test_the_benchmark_on_cpu(tmp_path: Path) -> None:
    file = tmp_path / "ttft.json"
    command = ["bench", "ttft", "--shape", "tiny", "--device", "cpu", "--vision-tokens", "64,144", "--runs", "1"]
    done = CliRunner().invoke(app, [*command, "--json", str(file)])
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    assert [row["vision_tokens"] for row in report["rows"]] == [64, 144]
    for row in report["rows"]:
        assert row["cold_ms"] > 0 and row["warm_ms"] > 0 and row["transformers_ms"] > 0
        assert row["warm_floor_ms"] is None, "there is no CUDA graph on CPU"
        assert row["active_tokens"] == 64 + 16
        assert row["kv_bytes"] == row["vision_tokens"] * 2 * 10 * 2 * 64 * 4


def test_an_unknown_shape_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["bench", "ttft", "--shape", "9000b", "--device", "cpu", "--json", str(tmp_path / "x")]
    )
    assert done.exit_code == 1 and "9000b" in done.output and "Traceback" not in done.output
