"""HTTP served by the ingress itself, without a proxy process in front: the hop costs more than a warm prefill.

Serve's own proxy hands every request and every chunk of an answer through another process (measured in
docs/performance.md). ``vlcache-dist serve`` lets the ingress listen; Serve still runs, watches and replaces it.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from vlcache_dist.errors import ConfigError

KEEP_ALIVE_S = 75
BACKLOG = 1024


class Listener:
    """An application at ``host:port``. Several replicas on one node share the port: the kernel spreads connections."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        """Raises ConfigError if the address cannot be bound."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
        )
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        """Serve on the running event loop."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    @property
    def healthy(self) -> bool:
        return self._task is not None and not self._task.done()

    async def close(self, patience_s: float) -> None:
        """Take no more connections; requests under way have ``patience_s`` to end."""
        self._server.should_exit = True
        if self._task is not None:
            done, _ = await asyncio.wait({self._task}, timeout=patience_s)
            if not done:
                self._server.force_exit = True
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()
