"""The benchmark of host time runs anywhere and compares trees in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_tree_against_itself(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "host_time.py"), "--sizes", "64", "--runs", "5"]
    command += ["--against", str(ROOT), "--turns", "1", "--json", str(file)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    (row,) = json.loads(file.read_text())["rows"]
    assert row["vision_tokens"] == 64 and row["before_ms"] > 0 and row["after_ms"] > 0
    assert 0.1 < row["after_over_before"] < 10 and 0 <= row["hidden_ms"] < row["after_ms"]
