"""An encoder worker from settings; not started yet."""

from __future__ import annotations

from vlcache_dist.assembly import Model, Site, TransportFactory, make_node, nixl_transport
from vlcache_dist.config import Settings
from vlcache_dist.encoder_workers.worker import EncoderWorker
from vlcache_dist.media import MediaProcessor
from vlcache_dist.types import Role


def build_encoder(settings: Settings, site: Site, transport: TransportFactory = nixl_transport) -> EncoderWorker:
    """The vision tower and a store for its output."""
    model = Model.open(settings)
    node = make_node(settings, site, Role.ENCODER, model, transport)
    tower = model.checkpoint.load_vision_tower(model.placement.device, model.placement.torch_dtype)
    processor = MediaProcessor.from_folder(model.checkpoint.folder, settings.media)
    return EncoderWorker(node, tower, processor, graph_start_s=settings.engine.graph_start_s)
