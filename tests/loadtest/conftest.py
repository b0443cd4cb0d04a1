from __future__ import annotations

from collections.abc import Iterator

import pytest
from caching_server import CachingBackend, Served

from vlcache_dist.loadtest import run


@pytest.fixture(autouse=True)
def _short_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LEAD_S", 0.2)


@pytest.fixture
def backend() -> CachingBackend:
    return CachingBackend()


@pytest.fixture
def served(backend: CachingBackend) -> Iterator[Served]:
    server = Served(backend)
    yield server
    server.close()
