"""A decode worker from settings; not started yet."""

from __future__ import annotations

from vlcache_dist.assembly import Model, Site, TransportFactory, make_engine, make_node, nixl_transport
from vlcache_dist.config import Settings
from vlcache_dist.decode_workers.worker import DecodeWorker
from vlcache_dist.types import Role


def build_decode(settings: Settings, site: Site, transport: TransportFactory = nixl_transport) -> DecodeWorker:
    """The language model, paged KV and a store for image KV."""
    model = Model.open(settings)
    node = make_node(settings, site, Role.DECODE, model, transport)
    return DecodeWorker(node, make_engine(settings, model, node))
