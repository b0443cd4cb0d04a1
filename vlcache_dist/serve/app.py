"""The Ray Serve application: an ingress that speaks HTTP, and one deployment per pool.

``build`` is what ``vlcache-dist serve``, Serve config files and KubeRay manifests all start
(``import_path: vlcache_dist.serve.app:build``, settings as its arguments).
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import ray
from fastapi import Depends, FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from vlcache_dist.actor import PUBLISH_S, RaySink, directory_of, tensor_parallel
from vlcache_dist.assembly import Site
from vlcache_dist.cache_directory.actor import ensure_directory
from vlcache_dist.config import Settings
from vlcache_dist.decode_workers.actor import DecodeReplica
from vlcache_dist.encoder_workers.actor import EncoderReplica
from vlcache_dist.errors import WorkerLost
from vlcache_dist.metrics import RUNNING, Metrics
from vlcache_dist.parallel.actor import bundles
from vlcache_dist.prefill_workers.actor import PrefillReplica
from vlcache_dist.serve.auth import ApiKeys, Guard
from vlcache_dist.serve.build import build_frontend
from vlcache_dist.serve.http import admission, create_app
from vlcache_dist.serve.listener import Listener
from vlcache_dist.serve.readiness import pool_resource

log = logging.getLogger(__name__)

UNBOUNDED = 10_000  #: Serve's own limits; the ingress has its own (``max_ongoing``), with an answer in OpenAI's shape
DRAIN_S = 10.0
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"  #: Ray's switch; HAProxy hides where requests come from


@serve.deployment(name="ingress")
@serve.ingress()
class Ingress:
    """HTTP in, events out. The pools' handles are held so that Serve runs them as one application."""

    async def __init__(self, settings: dict[str, Any], *pools: DeploymentHandle) -> None:  # type: ignore[misc]
        self._settings = Settings.of(**settings)
        self._pools = pools
        own = self._settings.serve
        self._guard = Guard(ApiKeys.of(own), addresses=own.direct or os.environ.get(HAPROXY) != "1")
        site = Site("ingress", ray.util.get_node_ip_address(), directory_of(self._settings))
        self._frontend = await asyncio.to_thread(build_frontend, self._settings, site)
        await self._frontend.start()
        self._metrics = Metrics(RaySink())
        self._metrics.record(RUNNING, 0)
        self._telling = asyncio.create_task(self._tell())
        self._app = self._build_app()
        self._listener: Listener | None = None
        if own.direct:
            self._listener = Listener(self._app, own.host, own.port)
            self._listener.start()

    async def _tell(self) -> None:
        """Gauges of an idle ingress stay on the Prometheus page."""
        while True:
            await asyncio.sleep(PUBLISH_S)
            self._metrics.tell_again()

    def _build_app(self) -> FastAPI:
        own = self._settings.serve
        app = create_app(
            self._frontend,
            max_body_bytes=own.max_body_bytes,
            max_ongoing=own.max_ongoing,
            metrics=self._metrics,
            guard=self._guard,
        )

        @app.get("/status", dependencies=[Depends(admission(self._guard))])
        async def status() -> dict[str, Any]:
            return await self._frontend.status()

        return app

    def __serve_build_asgi_app__(self) -> FastAPI:
        """For Serve's proxies, where there are any."""
        return self._app

    async def check_health(self) -> None:
        """Serve calls this; a replica that raises is replaced."""
        if self._listener is not None and not self._listener.healthy:
            raise WorkerLost("the ingress has stopped listening")

    async def __del__(self) -> None:
        listener, frontend = getattr(self, "_listener", None), getattr(self, "_frontend", None)
        telling = getattr(self, "_telling", None)
        if telling is not None:
            telling.cancel()
        if listener is not None:
            await listener.close(DRAIN_S / 2)
        if frontend is not None:
            await frontend.close()


def _together(size: int, gpus: float, resources: dict[str, float]) -> dict[str, Any]:
    """All ranks of a tensor-parallel worker on one node, for NVLink's sake; they come and go with its replica."""
    if size == 1:
        return {}
    return {"placement_group_bundles": bundles(size, gpus, resources), "placement_group_strategy": "STRICT_PACK"}


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application; also makes sure that the directory's shards exist. ``arguments``: ``Settings`` as nested
    mappings. Raises ConfigError."""
    settings = Settings.of(**arguments)
    own = settings.serve
    plain = settings.model_dump(mode="json")
    ensure_directory(own.app_name, own.directory_shards, heartbeat_s=own.heartbeat_s, expiry_s=own.expiry_s)

    def pool(deployment: Any, replicas: int) -> serve.Application:
        role = deployment.func_or_class.role
        resources = {pool_resource(role): 1.0} if own.pool_resources else {}
        return deployment.options(
            **_together(tensor_parallel(settings, role), own.gpus_per_worker, resources),
            num_replicas=replicas,
            ray_actor_options={
                "num_cpus": 0,
                "num_gpus": own.gpus_per_worker,
                "resources": resources,
            },
            max_ongoing_requests=UNBOUNDED,
            health_check_period_s=5,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=DRAIN_S,
        ).bind(plain)

    here = {f"node:{ray.util.get_node_ip_address()}": 0.001} if own.direct else {}
    ingress = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=own.ingresses,
        ray_actor_options={"num_cpus": 0, "resources": here},
        health_check_period_s=5,
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    pools = [pool(EncoderReplica, own.encoders), pool(PrefillReplica, own.prefills)]
    if own.decodes:
        pools.append(pool(DecodeReplica, own.decodes))
    return ingress.bind(plain, *pools)
