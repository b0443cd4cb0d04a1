"""``pytest -m gpu`` with a report: ``python -m vlcache_dist.bench.gpu_tests --json FILE``.

The report counts tests by outcome, names those that failed and says what a skipped one lacks. Exit status 1 if any
failed, so that a machine without a GPU, where all are skipped, passes. ``--sanitize``: under compute-sanitizer's
memcheck, whose findings count as a failure; without tests of gigabytes, which it would take minutes for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vlcache_dist.bench.ttft import machine

ROOT = Path(__file__).parents[2]
NOT_A_FAILURE = (0, 5)  #: pytest's exit status: all passed, none selected
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9")


def summary(junit: Path) -> dict[str, Any]:
    """What pytest's JUnit file says: counts, names of failed tests, reasons of skipped ones."""
    counts: Counter[str] = Counter()
    failed, skipped = [], Counter[str]()
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        kind = {"failure": "failed", "error": "failed", "skipped": "skipped"}[kinds[0]] if kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failed.append(name)
        elif kind == "skipped":
            skipped[next(child.get("message", "") for child in case if child.tag == "skipped")] += 1
    return {"counts": dict(counts), "failed": failed, "skipped": dict(skipped)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=Path, nargs="*", default=[ROOT / "tests"], help="files or folders")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        if options.sanitize:
            command = [*SANITIZER, *command, "-k", "not past_two_to"]
        done = subprocess.run([*command, *map(str, options.tests)], cwd=ROOT)
        report = {"machine": machine("cuda" if torch.cuda.is_available() else "cpu"), **summary(junit)}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if done.returncode in NOT_A_FAILURE else 1


if __name__ == "__main__":
    sys.exit(main())
