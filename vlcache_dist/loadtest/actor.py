"""Clients as Ray tasks, one or more per node: the load does not end where one machine's network or cores do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vlcache_dist.errors import ConfigError, WorkerLost
from vlcache_dist.loadtest.client import Job, drive
from vlcache_dist.loadtest.records import Record


def join(address: str) -> None:
    """Join a running Ray cluster. Raises ConfigError."""
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address, **quiet)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the Ray cluster at {address} cannot be joined: {str(error).splitlines()[0]}") from error


def leave() -> None:
    ray.shutdown()


def is_joined() -> bool:
    return bool(ray.is_initialized())


def places(url: str) -> list[str]:
    """Ids of the nodes from which ``url`` can be reached, in a fixed order: all that are alive, or, for an address of
    this machine alone, this one."""
    if urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost"):
        return [ray.get_runtime_context().get_node_id()]
    return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])


@ray.remote(num_cpus=0, max_retries=0)
def _drive(job: bytes) -> Iterator[bytes]:
    for batch in drive(msgspec.msgpack.decode(job, type=Job)):
        yield msgspec.msgpack.encode(batch)


def drive_on_nodes(jobs: Sequence[Job], nodes: Sequence[str]) -> Iterator[list[Record]]:
    """Every job in a task of its own, jobs spread over ``nodes`` in turn; records as they come. Raises WorkerLost if
    a task or its node dies. Closing the iterator stops the tasks."""
    running: list[Any] = []
    for number, job in enumerate(jobs):
        strategy = NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=False)
        running.append(_drive.options(scheduling_strategy=strategy).remote(msgspec.msgpack.encode(job)))
    try:
        while running:
            ready, _ = ray.wait(running, timeout=1.0, fetch_local=False)
            for task in cast(list[Any], ready):
                try:
                    batch: bytes = ray.get(next(task))
                except StopIteration:
                    running.remove(task)
                    continue
                yield msgspec.msgpack.decode(batch, type=list[Record])
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"a load client was lost: {str(error).splitlines()[-1]}") from error
    finally:
        for task in running:
            ray.cancel(task, force=False)
