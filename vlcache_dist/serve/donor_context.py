"""The context in which pictures' KV is computed for others (``engine.donors``), as the chat template writes it."""

from __future__ import annotations

from vlcache_dist import wire
from vlcache_dist.prompt import PromptBuilder

_GRID = (1, 8, 8)  # of a picture in whose place others will stand


def donor_context(prompts: PromptBuilder, *, ahead: bool) -> wire.DonorContext:
    """A user's turn of one picture and nothing else, behind the template's default system prompt."""
    prompt = prompts.alone(bytes(32), wire.MediaMeta("image", _GRID))
    (span,) = prompt.spans
    tokens = tuple(prompt.token_ids)
    return wire.DonorContext(tokens[: span.start], tokens[span.end :], ahead)
