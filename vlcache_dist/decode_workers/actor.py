"""The decode pool as Ray Serve sees it."""

from __future__ import annotations

from ray import serve

from vlcache_dist.actor import WorkerReplica
from vlcache_dist.decode_workers.build import build_decode


@serve.deployment(name="decode_workers")
class DecodeReplica(WorkerReplica):
    """One decode worker in a process of its own."""

    role = "decode"
    build = staticmethod(build_decode)
