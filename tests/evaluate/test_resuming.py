"""Journals and worker processes: what is done stays done, however a run ends."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vlcache_dist.errors import ConfigError, InvalidPlan, WorkerLost
from vlcache_dist.evaluate.generated import generate
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.run import outcome_units, read_outcomes
from vlcache_dist.evaluate.study import read_sightings, sighting_units
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import BenchSpec, Unit, run_units

SPEC = BenchSpec("tiny", "cpu", "float32")


def test_a_journal_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path, {"model": "m"}).add({"a": 1, "b": [1.5]})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "val')
    again = Journal(path, {"model": "m"})
    assert list(again) == ["a", "b"] and again["b"] == [1.5] and "c" not in again
    assert path.read_bytes() == whole
    again.add({"c": None})
    assert "c" in Journal(path, {"model": "m"})


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path, {"model": "m", "seed": 1}).add({"a": 1})
    with pytest.raises(ConfigError, match="another seed"):
        Journal(path, {"model": "m", "seed": 2})
    assert "a" in Journal(path, {"model": "m", "seed": 1})
    path.write_text("no json\n")
    with pytest.raises(ConfigError, match="not a journal"):
        Journal(path, {})
    path.write_text('{"mod')  # stopped while it wrote its first line: nothing was done yet
    assert list(Journal(path, {"model": "m"})) == []


def _note(key: str, folder: Path, bench: Workbench | None) -> dict[str, Any]:
    (folder / key).write_text("done")
    return {key: os.getpid()}


def _die(bench: Workbench) -> dict[str, Any]:
    os._exit(3)


def _fail(bench: Workbench | None) -> dict[str, Any]:
    raise InvalidPlan("no")


def test_only_what_is_missing_is_done_and_an_error_keeps_what_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", {})
    journal.add({"a": 0})
    bench = Workbench("tiny", device="cpu", dtype="float32")
    units = [Unit((key,), partial(_note, key, tmp_path)) for key in ("a", "b")]
    said: list[tuple[int, int]] = []
    with pytest.raises(InvalidPlan):
        run_units(SPEC, [*units, Unit(("c",), _fail)], journal, 1, lambda *at: said.append(at), bench)
    assert said == [(1, 3), (2, 3)]
    assert not (tmp_path / "a").exists() and (tmp_path / "b").exists()
    assert set(Journal(tmp_path / "j.jsonl", {})) == {"a", "b"}
    with pytest.raises(ConfigError, match="at least 1"):
        run_units(SPEC, units, journal, 0)


def test_processes_measure_what_one_does_and_a_dead_one_is_named(tmp_path: Path) -> None:
    cases = [case for case in generate("tune", 1, 3) if case.format in ("swapped labels", "question first")]
    policies, probes = ["none", "random:20", "attend:5@8+shift:1"], (0, 3)
    alone, shared = Journal(None, {}), Journal(tmp_path / "shared.jsonl", {})
    first = outcome_units(cases, policies[:1], shared)
    run_units(SPEC, first, shared, 1, bench=Workbench("tiny", device="cpu", dtype="float32"))
    for journal, workers in ((alone, 1), (shared, 2)):
        units = [*outcome_units(cases, policies, journal), *sighting_units(cases, [probes], journal)]
        if workers == 2:
            assert not any("none" in key.split() for unit in units for key in unit.keys), "that policy is done"
            with pytest.raises(WorkerLost, match="goes on"):
                run_units(SPEC, [*units, Unit(("x",), _die)], journal, workers)
            units = [*outcome_units(cases, policies, journal), *sighting_units(cases, [probes], journal)]
        run_units(SPEC, units, journal, workers)
    a, b = (list(read_outcomes(cases, policies, journal)) for journal in (alone, shared))
    assert [(o.format, o.policy, o.right) for o in a] == [(o.format, o.policy, o.right) for o in b]
    assert [o.kl for o in a] == pytest.approx([o.kl for o in b], abs=1e-4)
    seen = read_sightings(cases, probes, shared)
    assert [s.harmful for s in seen] == [s.harmful for s in read_sightings(cases, probes, alone)]
    assert seen[0].ratios.shape[1:] == (2, 10, 3)
