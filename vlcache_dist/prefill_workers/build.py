"""A prefill worker from settings; not started yet."""

from __future__ import annotations

from vlcache_dist.assembly import Site, TransportFactory, make_language_worker, nixl_transport
from vlcache_dist.config import Settings
from vlcache_dist.prefill_workers.worker import PrefillWorker
from vlcache_dist.reuse.guard import Guard
from vlcache_dist.types import Role


def build_prefill(settings: Settings, site: Site, transport: TransportFactory = nixl_transport) -> PrefillWorker:
    """The language model, paged KV and a store for image KV; without a decode pool, a worker that decodes as well."""
    role = Role.PREFILL if settings.serve.decodes else Role.COLOCATED
    node, engine = make_language_worker(settings, site, role, transport)
    guard = Guard(settings.engine.guard_budget, settings.engine.guard_sampling, owner=node.worker_id)
    return PrefillWorker(node, engine, guard)
