"""Run many benchmarks one after the other, each in a process of its own: what fails or hangs takes nothing with it.

A part's report lies in ``DIR`` under its final name if and only if the part has succeeded, so a campaign that was cut
short goes on where it stopped. What an unfinished part wrote is kept in ``DIR/partial``, what it printed in
``DIR/logs``, what became of all parts in ``DIR/campaign.json``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

JSON = "{json}"  #: stands for the report's path in a command
DIR = "{dir}"  #: stands for the folder of final reports
SCRATCH = "{scratch}"  #: stands for a folder for large files that nobody keeps
FAREWELL_S = 15.0  #: from the interrupt of a part that is out of time until it is killed
LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Part:
    """``command``: what follows the Python interpreter. ``least_s``: with less time left it is not begun; ``limit_s``:
    after so long it is interrupted. ``modules`` and ``programs``: without them it is skipped."""

    name: str
    file: str
    command: tuple[str, ...]
    least_s: float
    limit_s: float
    gpus: int = 1
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """``state``: done, present (from an earlier call), skipped, failed or timed out; ``why`` explains all but the
    first two."""

    name: str
    file: str
    state: str
    seconds: float
    why: str = ""


class Campaign:
    """``gpus``: how many there are; None where parts are rehearsed without one, whatever they need."""

    def __init__(self, folder: Path, scratch: Path, gpus: int | None, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._scratch = scratch
        self._gpus = gpus
        self._environment = {**os.environ, **environment}
        self._known: dict[str, dict[str, object]] = {}
        for each in (folder, folder / "partial", folder / "logs", scratch):
            each.mkdir(parents=True, exist_ok=True)
        if self._book.exists():
            self._known = json.loads(self._book.read_text())

    @property
    def _book(self) -> Path:
        return self._folder / "campaign.json"

    def run(self, parts: Sequence[Part], seconds: float) -> list[Outcome]:
        """All parts, in order, but those that an earlier call tried in vain last; ``seconds`` bounds them together."""
        end = time.monotonic() + seconds
        outcomes = []
        for part in sorted(parts, key=self._tried):
            outcome = self._one(part, end - time.monotonic())
            outcomes.append(outcome)
            took = f"{outcome.seconds:6.1f} s" if outcome.state != "skipped" else " " * 8
            reason = outcome.why.rpartition("\n")[2]
            print(f"{outcome.state:10} {took}  {part.name:24} {reason}".rstrip(), flush=True)
            if outcome.state not in ("skipped", "present"):
                self._known[part.name] = {
                    "state": outcome.state,
                    "seconds": round(outcome.seconds, 1),
                    "why": outcome.why,
                }
                self._book.write_text(json.dumps(self._known, indent=1) + "\n")
        return outcomes

    def _tried(self, part: Part) -> bool:
        return self._known.get(part.name, {}).get("state") in ("failed", "timed out")

    def _one(self, part: Part, left_s: float) -> Outcome:
        if (self._folder / part.file).exists():
            return Outcome(part.name, part.file, "present", 0.0)
        why = self._missing(part) or ("" if left_s >= part.least_s else f"{left_s:.0f} s left, needs {part.least_s:g}")
        if why:
            return Outcome(part.name, part.file, "skipped", 0.0, why)
        partial, log = self._folder / "partial" / part.file, self._folder / "logs" / f"{part.name}.log"
        partial.unlink(missing_ok=True)
        places = {JSON: str(partial), DIR: str(self._folder), SCRATCH: str(self._scratch)}
        command = [sys.executable]
        for word in part.command:
            for mark, path in places.items():
                word = word.replace(mark, path)
            command.append(word)
        started = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment, start_new_session=True
            )
            try:
                code: int | None = process.wait(min(part.limit_s, left_s))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        took = time.monotonic() - started
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        if code is None:
            return Outcome(part.name, part.file, "timed out", took, last)
        if code != 0 or not partial.exists():
            return Outcome(part.name, part.file, "failed", took, f"{last}\nexit status {code}")
        partial.replace(self._folder / part.file)
        return Outcome(part.name, part.file, "done", took)

    def _missing(self, part: Part) -> str:
        if self._gpus is not None and part.gpus > self._gpus:
            return f"needs {part.gpus} GPUs, {self._gpus} here"
        absent = [name for name in part.modules if importlib.util.find_spec(name) is None]
        absent += [name for name in part.programs if shutil.which(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt what is left of the part, and kill what does not end by itself. Its process is the leader of a session
    of its own, so its children are found by the group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(FAREWELL_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
