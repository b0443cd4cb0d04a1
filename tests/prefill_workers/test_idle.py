"""Requests come before what nobody waits for, for as long as there is patience."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from vlcache_dist.prefill_workers import idle


@pytest.mark.parametrize(("running", "waiting"), [(0, 0), (1, 0), (0, 1)])
def test_who_has_the_engine(monkeypatch: pytest.MonkeyPatch, running: int, waiting: int) -> None:
    stats, busy = SimpleNamespace(running=running, waiting=waiting), bool(running or waiting)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    assert idle.may_begin(stats, since=100.0) == (not busy)  # type: ignore[arg-type]
    assert idle.may_begin(stats, since=100.0 - idle.PATIENCE_S) == (not busy)  # type: ignore[arg-type]
    assert idle.may_begin(stats, since=99.9 - idle.PATIENCE_S)  # type: ignore[arg-type]
