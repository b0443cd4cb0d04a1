"""The shards as actors of a real Ray: found by name, restarted, ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray
from directory_cases import entry, info, key

from vlcache_dist.cache_directory.actor import NAMESPACE, ensure_directory, resolver, shutdown_directory
from vlcache_dist.cache_directory.client import DirectoryClient
from vlcache_dist.rpc import RpcClient

pytestmark = pytest.mark.cluster

TIMES = {"heartbeat_s": 0.2, "expiry_s": 2.0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def app(cluster: None, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name
    yield name
    shutdown_directory(name, 2)


def names() -> set[str]:
    listed: Sequence[Any] = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in listed if actor["namespace"] == NAMESPACE}


async def test_everybody_finds_the_same_shards(app: str) -> None:
    first = await resolver(app, 2, **TIMES)()
    assert len(set(first)) == 2
    assert all(f"//{ray.util.get_node_ip_address()}:" in address for address in first), "reachable from other hosts"
    assert await resolver(app, 2, **TIMES)() == first
    handles = ensure_directory(app, 2, **TIMES)
    assert ray.get([handle.address.remote() for handle in handles]) == first


async def test_a_killed_shard_comes_back_and_is_told_again(app: str) -> None:
    resolve = resolver(app, 2, **TIMES)
    before = await resolve()
    rpc = RpcClient()
    stock = [entry(n) for n in range(20)]
    worker = DirectoryClient(rpc, resolve, info=info("a"), inventory=lambda: stock)
    try:
        await worker.start()
        for restarted in (True, False):  # Ray restarts a crashed one; one that was removed is made anew
            ray.kill(ensure_directory(app, 2, **TIMES)[0], no_restart=not restarted)
            for _ in range(1200):  # Ray may take long to start a process where many are busy
                found = await worker.lookup([one.key for one in stock])
                if worker._shards[0].address != before[0] and all(state.kv for state in found):
                    break
                await asyncio.sleep(0.1)
            else:
                pytest.fail("the shard's entries did not come back")
            after = await resolve()
            assert after[0] != before[0]
            assert after[1] == before[1]
            before = after
        assert (await worker.lookup([key(99)]))[0].kv == ()
    finally:
        await worker.close()
        await rpc.close()


async def test_shutting_down_ends_them_and_may_be_repeated(app: str) -> None:
    ensure_directory(app, 2, **TIMES)
    shards = {f"{app}-directory-{n}" for n in range(2)}
    assert shards <= names()
    for _ in range(2):
        shutdown_directory(app, 2)
        for _ in range(300):
            if not shards & names():
                break
            await asyncio.sleep(0.1)
        assert not shards & names()
