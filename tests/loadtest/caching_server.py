"""The real HTTP layer, in a thread, around a backend that remembers pictures and computes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from vlcache_dist.errors import Overloaded
from vlcache_dist.metrics import Metrics
from vlcache_dist.serve.chat import ChatEvent, ChatRequest, Delta, Done, provenance
from vlcache_dist.serve.http import create_app
from vlcache_dist.types import FinishReason, KVSource, ReuseMode, SpanReport

TOKENS = 64


class CachingBackend:
    """A picture costs ``cost_s`` the first time, or every time without reuse."""

    model = "tiny"
    max_model_len = 4096

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.cost_s = 0.0
        self.refuse_every = 0
        self.requests: list[ChatRequest] = []
        self.at: list[float] = []

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        self.requests.append(request)
        self.at.append(time.monotonic())
        if self.refuse_every and len(self.requests) % self.refuse_every == 0:
            raise Overloaded("enough")
        reports = []
        for item in request.conversation.media:
            digest = hashlib.sha256(repr(item).encode()).hexdigest()
            hit = digest in self.known and request.reuse is not ReuseMode.OFF
            if request.reuse is not ReuseMode.OFF:
                self.known.add(digest)
            source = KVSource.LOCAL if hit else KVSource.COMPUTED
            reports.append(SpanReport(digest, source, TOKENS, 60 if hit else 0, 4 if hit else 0))
            await asyncio.sleep(0 if hit else self.cost_s)
        for piece in ("4", "2"):
            yield Delta(piece)
            await asyncio.sleep(0.001)
        cached = sum(report.reused_tokens for report in reports)
        more = provenance(reports, prefill_worker="prefill-0", decode_worker="decode-0", handoff_bytes=10)
        yield Done(FinishReason.STOP, TOKENS * len(reports) + 9, 2, cached, more)

    async def health(self) -> dict[str, Any]:
        return {}


class Served:
    """``url`` answers like a deployment; ``metrics`` are its counters."""

    def __init__(self, backend: CachingBackend) -> None:
        self.metrics = Metrics()
        self.app: FastAPI = create_app(backend, metrics=self.metrics)
        load = {"running": 1, "waiting": 0, "kv_blocks_free": 3, "kv_blocks_total": 4}
        load |= {"store_bytes_used": 1, "store_bytes_total": 2}
        roles = ("encoder", "prefill", "prefill", "decode")

        @self.app.get("/status")
        async def status() -> dict[str, Any]:
            return {"model": "tiny", "workers": [{"role": role, "load": load} for role in roles]}

        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=1, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        assert not self._thread.is_alive()


def wait_for(ready: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)
