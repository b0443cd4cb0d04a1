"""The directory's shards as named, detached Ray actors: whoever starts the application first makes them, Ray restarts
them, and members find them by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray

from vlcache_dist.cache_directory.server import DirectoryServer
from vlcache_dist.errors import WorkerLost

NAMESPACE = "vlcache"


class DirectoryShard:
    """One shard. A restarted one is empty and has another epoch and address."""

    def __init__(self, heartbeat_s: float, expiry_s: float) -> None:
        self._server = DirectoryServer(ray.util.get_node_ip_address(), heartbeat_s=heartbeat_s, expiry_s=expiry_s)
        self._starting = asyncio.Lock()

    async def address(self) -> str:
        """Where it listens; starts the server on first use."""
        async with self._starting:
            return self._server.rpc.address or await self._server.start()


def _name(app: str, shard: int) -> str:
    return f"{app}-directory-{shard}"


def ensure_directory(app: str, shards: int, *, heartbeat_s: float, expiry_s: float) -> list[Any]:
    """Handles of the application's shards, which are created if they are not there."""
    actor = ray.remote(DirectoryShard)
    return [
        actor.options(  # type: ignore[attr-defined]
            name=_name(app, shard),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        ).remote(heartbeat_s, expiry_s)
        for shard in range(shards)
    ]


def resolver(app: str, shards: int, *, heartbeat_s: float, expiry_s: float) -> Callable[[], Awaitable[Sequence[str]]]:
    """What ``DirectoryClient`` needs: the shards' addresses, as they are now. Raises WorkerLost."""

    async def resolve() -> Sequence[str]:
        try:
            # Asks Ray's control store, which blocks while that is restarted: the loop must go on answering pings.
            handles = await asyncio.to_thread(ensure_directory, app, shards, heartbeat_s=heartbeat_s, expiry_s=expiry_s)
            return await asyncio.wait_for(asyncio.gather(*(handle.address.remote() for handle in handles)), 30.0)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise WorkerLost(f"the cache directory is not to be found: {error}") from error

    return resolve


def shutdown_directory(app: str, shards: int) -> None:
    """End the application's shards; those that are not there are ignored."""
    for shard in range(shards):
        try:
            actor = ray.get_actor(_name(app, shard), namespace=NAMESPACE)
        except ValueError:
            continue
        ray.kill(actor, no_restart=True)
