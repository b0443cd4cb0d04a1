"""The prefill pool as Ray Serve sees it."""

from __future__ import annotations

from ray import serve

from vlcache_dist.actor import WorkerReplica
from vlcache_dist.prefill_workers.build import build_prefill


@serve.deployment(name="prefill_workers")
class PrefillReplica(WorkerReplica):
    """One prefill worker in a process of its own."""

    role = "prefill"
    build = staticmethod(build_prefill)
