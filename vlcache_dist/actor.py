"""What the pools' Ray actors share: a Ray Serve replica around one plain worker.

Ray owns the life of it (placement, health checks, scaling, rolling updates); requests never pass through here, they
reach the worker's ZeroMQ address, which it announces to the directory.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
import ray
from ray import serve
from ray.util import metrics as ray_metrics

from vlcache_dist.assembly import Site
from vlcache_dist.cache_directory.actor import resolver
from vlcache_dist.config import Settings
from vlcache_dist.errors import VLCacheError
from vlcache_dist.metrics import HEALTHY, Metric, WorkerSamples, buckets
from vlcache_dist.node import Node
from vlcache_dist.parallel.actor import Actors
from vlcache_dist.parallel.group import Launcher
from vlcache_dist.parallel.processes import Processes
from vlcache_dist.types import Role

log = logging.getLogger(__name__)
PUBLISH_S = 1.0


class Worker(Protocol):
    """An encoder, prefill or decode worker."""

    node: Node

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class WorkerReplica:
    """Builds a worker in its own process, keeps it until Serve stops the replica.

    A subclass names its ``role`` and ``build``; the worker's name is the role and the replica's rank.
    """

    role: str
    build: Callable[..., Worker]

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        parsed = Settings.of(**settings)
        host = ray.util.get_node_ip_address()
        site = Site(f"{self.role}-{_rank()}", host, directory_of(parsed), _shards(parsed, self.role, host))
        limit_cpu_threads()
        self._worker = await asyncio.to_thread(type(self).build, parsed, site)
        await self._worker.start()
        self._worker.node.spawn(publish(self._worker.node))
        log.info("%s listens at %s", self._worker.node.worker_id, self._worker.node.address)

    async def check_health(self) -> None:
        """Serve replaces the replica if this raises."""
        if not self._worker.node.healthy:
            raise RuntimeError(f"{self._worker.node.worker_id} is not healthy")

    async def __del__(self) -> None:  # type: ignore[misc]
        worker = getattr(self, "_worker", None)
        if worker is not None:
            await worker.close()


class RaySink:
    """Metrics to Ray, whose Prometheus endpoint on this node exports them (``metrics.Sink``)."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        instrument = self._instruments.get(metric.name)
        if instrument is None:
            instrument = self._instruments[metric.name] = _instrument(metric)
        tags = dict(labels)
        if metric.kind == "counter":
            if value > 0:  # Ray refuses to count nothing
                instrument.inc(value, tags=tags)
        elif metric.kind == "gauge":
            instrument.set(value, tags=tags)
        else:
            instrument.observe(value, tags=tags)


def _instrument(metric: Metric) -> Any:
    if metric.kind == "counter":
        return ray_metrics.Counter(metric.name, metric.help, metric.labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, metric.help, metric.labels)
    return ray_metrics.Histogram(metric.name, metric.help, list(buckets(metric)), metric.labels)


async def publish(node: Node) -> None:
    """A worker's figures to Ray, once a second, for ever."""
    samples, sink = WorkerSamples(node.name, node.role.value), RaySink()
    while True:
        try:
            for metric, labels, value in samples.of(await node.status(), msgspec.to_builtins(node.load())):
                sink.record(metric, value, labels)
        except VLCacheError as error:  # the health check has the last word on a worker that cannot say how it is
            log.info("%s has no figures to publish: %s", node.worker_id, error)
            sink.record(HEALTHY, 0.0, {"worker": node.name, "role": node.role.value})
        await asyncio.sleep(PUBLISH_S)


def directory_of(settings: Settings) -> Any:
    """How a process of the application finds the directory's shards."""
    own = settings.serve
    return resolver(own.app_name, own.directory_shards, heartbeat_s=own.heartbeat_s, expiry_s=own.expiry_s)


def limit_cpu_threads() -> None:
    """Workers on one CPU machine share its cores; ``OMP_NUM_THREADS`` of the user wins."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ or not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("VLCACHE_CPU_THREADS", "1")))


def tensor_parallel(settings: Settings, role: str) -> int:
    """Ranks of a pool's workers. Encoders have one: pictures are encoded side by side, not shared out."""
    return 1 if role == Role.ENCODER else settings.engine.tensor_parallel


def _shards(settings: Settings, role: str, host: str) -> Launcher:
    if tensor_parallel(settings, role) == 1:
        return Processes()
    return Actors(host, settings.serve.gpus_per_worker)


def _rank() -> int:
    """The replica's number in its pool, stable across restarts."""
    return int(serve.get_replica_context().rank.rank)
