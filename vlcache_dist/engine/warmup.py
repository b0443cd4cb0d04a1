"""What a fresh engine does before its first request, so that no user waits for what happens once."""

from __future__ import annotations

import logging
import time

from vlcache_dist.engine.api import Failed
from vlcache_dist.engine.engine import Engine
from vlcache_dist.engine.lazy import Traffic
from vlcache_dist.types import ReuseMode, SamplingParams
from vlcache_dist.wire import Generation

log = logging.getLogger(__name__)
PROMPT_TOKENS = 128
GRAPH_KEYS = 1 << 15  #: longer contexts get their graphs when they come


def warm_up(engine: Engine, *, decodes: bool = True) -> None:
    """Prefill and decode a text of no meaning, compile every kernel, and capture graphs for ``graph_start_s`` seconds;
    afterwards nothing of it is left. ``decodes``: sequences will be decoded here. Raises the request's error."""
    _generate(engine)
    config, started = engine.config, time.monotonic()
    keys = min(config.max_model_len, GRAPH_KEYS, engine.pool.num_blocks * config.block_size)
    engine.runner.expect(Traffic(config.max_batch_tokens, config.max_running, keys, decodes))
    compiled = time.monotonic()
    while time.monotonic() < compiled + config.graph_start_s and engine.runner.prepare():
        pass
    if (report := engine.runner.graph_report()) is not None:
        log.info(
            "compiled in %.1f s, captured %d graphs in %.1f s; %d of those planned are left for idle time",
            compiled - started, report.captured, time.monotonic() - compiled, report.planned,
        )  # fmt: skip


def _generate(engine: Engine) -> None:
    length = min(PROMPT_TOKENS, engine.config.max_model_len - 4)
    request = Generation(
        request_id="warm-up",
        tenant="",
        token_ids=(1,) * length,
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
