"""The vision-encoder pool as Ray Serve sees it."""

from __future__ import annotations

from ray import serve

from vlcache_dist.actor import WorkerReplica
from vlcache_dist.encoder_workers.build import build_encoder


@serve.deployment(name="encoder_workers")
class EncoderReplica(WorkerReplica):
    """One vision-encoder worker in a process of its own."""

    role = "encoder"
    build = staticmethod(build_encoder)
