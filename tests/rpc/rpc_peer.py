"""A peer in a process of its own, to be killed, stopped and continued.

``python rpc_peer.py serve``: answers Status with its process id, never answers Drain; prints its address.
``python rpc_peer.py call ADDRESS``: calls Drain at ADDRESS, and prints how that ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from vlcache_dist import wire
from vlcache_dist.errors import VLCacheError
from vlcache_dist.rpc import Call, RpcClient, RpcServer

Serve = Callable[..., Awaitable[RpcServer]]  #: the ``serve`` fixture


class Peer:
    """The test's handle on it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self) -> str:
        """The next line it prints; blocks."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Peer]:
    command = [sys.executable, str(Path(__file__)), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Peer(process)
        finally:
            process.kill()


async def _pid(message: wire.Status, call: Call) -> wire.StatusReply:
    return wire.StatusReply({"pid": os.getpid()})


async def _never(message: wire.Drain, call: Call) -> wire.Ok:
    await asyncio.Event().wait()
    return wire.Ok()


async def _serve() -> None:
    server = RpcServer()
    server.handle(wire.Status, _pid)
    server.handle(wire.Drain, _never)
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


async def _call(address: str) -> None:
    client = RpcClient()
    print("calling", flush=True)
    try:
        await client.call(address, wire.Drain(), timeout_s=60)
        print("answered", flush=True)
    except VLCacheError as error:
        print(error.code, flush=True)
    await client.close()


if __name__ == "__main__":
    asyncio.run(_serve() if sys.argv[1] == "serve" else _call(sys.argv[2]))
