"""A decode worker from settings; not started yet."""

from __future__ import annotations

from vlcache_dist.assembly import Site, TransportFactory, make_language_worker, nixl_transport
from vlcache_dist.config import Settings
from vlcache_dist.decode_workers.worker import DecodeWorker
from vlcache_dist.types import Role


def build_decode(settings: Settings, site: Site, transport: TransportFactory = nixl_transport) -> DecodeWorker:
    """The language model, paged KV and a store for image KV."""
    return DecodeWorker(*make_language_worker(settings, site, Role.DECODE, transport))
