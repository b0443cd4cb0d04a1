"""The ingress's frontend from settings; not started yet."""

from __future__ import annotations

from vlcache_dist.assembly import Model, Site
from vlcache_dist.config import Settings
from vlcache_dist.media import MediaProcessor
from vlcache_dist.node import FrontNode
from vlcache_dist.prompt import PromptBuilder
from vlcache_dist.serve.frontend import Frontend


def build_frontend(settings: Settings, site: Site) -> Frontend:
    """Tokenizer and processor, no weights, no device."""
    model = Model.open(settings)
    config = model.checkpoint.config
    limit = config.text.max_position_embeddings
    prompts = PromptBuilder.from_folder(
        model.checkpoint.folder,
        merge_size=config.vision.spatial_merge_size,
        max_model_len=min(limit, settings.model.max_model_len or limit),
    )
    return Frontend(
        FrontNode(site.host, site.directory),
        settings,
        model=settings.model.served_name or settings.model.model,
        layout=model.layout,
        identity=model.identity,
        processor=MediaProcessor.from_folder(model.checkpoint.folder, settings.media),
        prompts=prompts,
        eos_token_ids=config.eos_token_ids,
    )
