"""Servers and clients that are closed again, whatever a test does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from rpc_peer import Serve

from vlcache_dist.rpc import Handler, RpcClient, RpcServer
from vlcache_dist.wire import Message


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """``await serve({Kind: handler}, peer_timeout_s=...)``: a running server."""
    servers: list[RpcServer] = []

    async def start(handlers: dict[type[Message], Handler], **options: Any) -> RpcServer:
        server = RpcServer(**options)
        for kind, handler in handlers.items():
            server.handle(kind, handler)
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def client() -> AsyncIterator[RpcClient]:
    client = RpcClient()
    yield client
    await client.close()
