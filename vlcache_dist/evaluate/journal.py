"""Finished work in a file, a line each, so that a run that was stopped goes on where it left off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlcache_dist.errors import ConfigError


class Journal:
    """JSON Lines: first what the work depends on (``made_by``), then ``{"key", "value"}`` per finished piece. One
    process writes. A last line that was torn when the run was stopped is cut off. Without a path nothing is kept."""

    def __init__(self, path: Path | None, made_by: Mapping[str, Any]) -> None:
        """Raises ConfigError if the file was begun by a run that differs in ``made_by``, and OSError."""
        self._done: dict[str, Any] = {}
        self._path = path
        if path is None:
            return
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode().splitlines()
        if not lines:
            path.write_text(json.dumps({"made_by": dict(made_by)}) + "\n")
            return
        try:
            head, *rest = map(json.loads, lines)
            before = head["made_by"]
            self._done = {line["key"]: line["value"] for line in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a journal of finished work ({error}): move it away") from error
        if before != json.loads(json.dumps(dict(made_by))):
            differs = sorted(k for k in {*before, *made_by} if before.get(k) != made_by.get(k))
            raise ConfigError(f"{path} was begun with another {', '.join(differs)}: move it away or name another file")
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._done)

    def add(self, values: Mapping[str, Any]) -> None:
        """Finished pieces, JSON values all. They are on disk when this returns."""
        self._done |= values
        if self._path is not None:
            lines = "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in values.items())
            with self._path.open("a") as file:
                file.write(lines)
