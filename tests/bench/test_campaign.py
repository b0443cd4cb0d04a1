"""Many benchmarks in one command: failures stay apart, what is there is not run again, what is missing is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlcache_dist.bench import gpu_tests
from vlcache_dist.bench.campaign import JSON, Campaign, Part
from vlcache_dist.bench.parts import parts, rehearsal

ROOT = Path(__file__).parents[2]
WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{}'); "


def part(name: str, code: str = "", **options: object) -> Part:
    given = {"least_s": 0, "limit_s": 60, "gpus": 0} | options
    return Part(name, f"{name}.json", ("-c", WRITE + code, JSON), **given)  # type: ignore[arg-type]


def campaign(folder: Path, gpus: int | None = 1) -> Campaign:
    return Campaign(folder / "out", folder / "scratch", gpus, {})


def states(found: list[object]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in found}  # type: ignore[attr-defined]


def test_a_failure_takes_nothing_with_it(tmp_path: Path) -> None:
    wrong = part("wrong", "print('on the way'); raise ValueError('what went wrong')")
    empty = Part("empty", "empty.json", ("-c", "print('no report')"), 0, 60)
    found = campaign(tmp_path).run([part("one"), wrong, empty, part("last")], 60)
    assert states(found) == {"one": "done", "wrong": "failed", "empty": "failed", "last": "done"}
    assert "what went wrong" in found[1].why and "no report" in found[2].why
    out = tmp_path / "out"
    assert sorted(file.name for file in out.glob("*.json")) == ["campaign.json", "last.json", "one.json"]
    assert (out / "partial" / "wrong.json").exists() and "on the way" in (out / "logs" / "wrong.log").read_text()
    book = json.loads((out / "campaign.json").read_text())
    assert {name: entry["state"] for name, entry in book.items()} == states(found)


def test_the_next_call_goes_on_and_tries_failures_last(tmp_path: Path) -> None:
    both = [part("first", "sys.exit(3)"), part("second"), part("third")]
    campaign(tmp_path).run(both[:2], 60)
    report = tmp_path / "out" / "second.json"
    before = report.stat().st_mtime_ns
    again = campaign(tmp_path).run([part("first"), *both[1:]], 60)
    assert [(o.name, o.state) for o in again] == [("second", "present"), ("third", "done"), ("first", "done")]
    assert report.stat().st_mtime_ns == before


def test_what_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = "import subprocess, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    hang = part("hang", child + f"pathlib.Path({str(pid)!r}).write_text(str(c.pid)); time.sleep(600)", limit_s=2)
    found = campaign(tmp_path).run([hang, part("after")], 60)
    assert states(found) == {"hang": "timed out", "after": "done"} and found[0].seconds < 30
    end = time.monotonic() + 10
    while _alive(int(pid.read_text())):
        assert time.monotonic() < end, "the part's child is still there"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_cannot_be_run_is_skipped_and_said(tmp_path: Path) -> None:
    absent = part("absent", modules=("no_such_module",), programs=("no-such-program", "sh"))
    given = [part("two", gpus=2), absent, part("long", least_s=100), part("short")]
    found = campaign(tmp_path).run(given, 50)
    assert states(found) == {"two": "skipped", "absent": "skipped", "long": "skipped", "short": "done"}
    whys = [outcome.why for outcome in found]
    assert whys[0] == "needs 2 GPUs, 1 here" and whys[1] == "not installed: no_such_module, no-such-program"
    assert whys[2] == "50 s left, needs 100"
    rehearsed = campaign(tmp_path, gpus=None).run(given[:1], 50)
    assert states(rehearsed) == {"two": "done"}


def test_time_that_is_left_bounds_a_part(tmp_path: Path) -> None:
    found = campaign(tmp_path).run([part("slow", "import time; time.sleep(600)")], 1.5)
    assert states(found) == {"slow": "timed out"} and found[0].seconds < 30


@pytest.mark.parametrize("listed", [parts("7b", "h200", 1), parts("7b", "h200", 2), rehearsal()])
def test_commands_name_scripts_and_options_that_exist(listed: list[Part]) -> None:
    assert len({part.name for part in listed}) == len({part.file for part in listed}) == len(listed)
    for each in listed:
        script, words = each.command[0], each.command[1:]
        if script == "-m":
            script, words = each.command[1].replace(".", "/") + ".py", each.command[2:]
        source = (ROOT / script).read_text().replace("_", "-")
        for word in words:
            if re.fullmatch("--[a-z-]+", word) and script != "vlcache_dist/cli.py":
                assert f'"{word}"' in source, f"{each.name}: {script} has no option {word}"
        assert any(JSON in word for word in words), f"{each.name} writes no report"
        assert each.least_s <= each.limit_s


def test_two_gpus_are_used_first_where_there_are_two() -> None:
    assert [p.gpus for p in parts("7b", "h200", 2)][:2] == [2, 2] and parts("7b", "h200", 1)[0].gpus == 1
    both = (parts("7b", "h200", n) for n in (1, 2))
    assert len({frozenset(p.file for p in listed) for listed in both}) == 1


def test_every_script_that_needs_a_gpu_is_part_of_it() -> None:
    listed = {Path(each.command[0]).name for each in parts("7b", "h200", 2)} - {"-m"}
    sources = {file.name: file.read_text() for file in (ROOT / "benchmarks").glob("*.py") if file.name != "all.py"}
    assert listed == {name for name, text in sources.items() if 'default="cuda' in text or "torch.cuda" in text}


def test_the_rehearsal_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/all.py", "--out", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    command += ["--shape", "tiny", "--device", "cpu", "--only", "ttft,stalls"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for state in ("done", "present"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()] == [state, state]
    assert json.loads((tmp_path / "ttft-tiny-cpu.json").read_text())["rows"][0]["cold_ms"] > 0
    assert json.loads((tmp_path / "stalls-tiny-cpu.json").read_text())["steps"] > 0


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/all.py", "--out", str(tmp_path), "--device", "cpu"]
    for more, said in (
        (["--shape", "7b"], "only --shape tiny"),
        (["--shape", "tiny", "--only", "x"], "no such part: x"),
    ):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and said in done.stderr


def test_the_summary_of_gpu_tests(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="a" name="right"/>'
        '<testcase classname="a" name="wrong"><failure>x</failure></testcase>'
        '<testcase classname="a" name="broken"><error>x</error></testcase>'
        '<testcase classname="a" name="not here"><skipped message="needs CUDA"/></testcase></testsuite></testsuites>'
    )
    assert gpu_tests.summary(junit) == {
        "counts": {"passed": 1, "failed": 2, "skipped": 1},
        "failed": ["a::wrong", "a::broken"],
        "skipped": {"needs CUDA": 1},
    }
