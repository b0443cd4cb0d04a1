"""The tensor-parallel benchmark on the bundled shapes: every part measures, and one rank and two agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tensor_parallel.py"


def test_every_part_is_there(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--shape", "tiny", "--ranks", "2", "--runs", "1"]
    subprocess.run(
        [*command, "--vision-tokens", "16", "--batches", "--read-bytes", "65536", "--json", str(file)],
        check=True,
        timeout=120,
    )
    report = msgspec.json.decode(file.read_bytes())
    assert report["check"]["tokens_that_agree"] == report["check"]["tokens"] == 16
    assert report["check"]["kv_deviation"] < 1e-4 and report["check"]["logprob_deviation"] < 1e-4
    assert [row["rows"] for row in report["all_reduce"]["rows"]] == [1, 16, 64, 256, 1024, 4096]
    assert all(row["gbps"] > 0 for row in report["transfer"])
    assert report["engine_2"]["ranks"] == 2 and report["engine_2"]["ttft"][0]["warm_ms"] > 0
