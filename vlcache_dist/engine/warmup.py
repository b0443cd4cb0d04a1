"""What a fresh engine does before its first request, so that the first user does not wait for lazy initialization."""

from __future__ import annotations

import time

from vlcache_dist.engine.api import Failed
from vlcache_dist.engine.engine import Engine
from vlcache_dist.types import ReuseMode, SamplingParams
from vlcache_dist.wire import Generation

PROMPT_TOKENS = 128
DECODE_KEYS = 1 << 15  #: longer contexts get their graphs when they come


def warm_up(engine: Engine, *, decodes: bool = True) -> None:
    """Prefill and decode a text of no meaning; afterwards nothing of it is left. ``decodes``: make the decode steps'
    graphs too, where there are graphs. Raises the request's error."""
    length = min(PROMPT_TOKENS, engine.config.max_model_len - 4)
    request = Generation(
        request_id="warm-up",
        tenant="",
        token_ids=tuple(range(1, length + 1)),
        spans=(),
        sampling=SamplingParams(max_tokens=3, ignore_eos=True),
        reuse=ReuseMode.OFF,
        plan="none",
    )
    engine.add(request, time.monotonic())
    while engine.has_work():
        for event in engine.step(time.monotonic()):
            if isinstance(event, Failed):
                raise event.error
    if decodes:
        keys = min(engine.config.max_model_len, DECODE_KEYS, engine.pool.num_blocks * engine.config.block_size)
        engine.runner.prepare_decode(engine.config.max_running, keys)
