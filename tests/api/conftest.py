from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from scripted_server import ScriptedBackend, Served

from vlcache_dist.serve.http import create_app


@pytest.fixture
def backend(shared_backend: ScriptedBackend) -> ScriptedBackend:
    """The running server's backend, in its initial state."""
    shared_backend.answer, shared_backend.pause_s, shared_backend.fail_after = "The value is 42.", 0.0, None
    shared_backend.requests, shared_backend.healthy = [], None
    shared_backend.started, shared_backend.cancelled = threading.Event(), threading.Event()
    return shared_backend


@pytest.fixture(scope="session")
def shared_backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="session")
def server(shared_backend: ScriptedBackend) -> Iterator[Served]:
    served = Served(create_app(shared_backend, max_body_bytes=400_000, max_ongoing=8))
    yield served
    served.close()


@pytest.fixture
def client(server: Served, backend: ScriptedBackend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10) as made:
        yield made


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Any], Served]]:
    """Serve any ASGI application until the session ends."""
    running: list[Served] = []

    def start(app: Any) -> Served:
        running.append(Served(app))
        return running[-1]

    yield start
    for served in running:
        served.close()
