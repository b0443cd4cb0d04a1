"""When work that nobody waits for may have the engine: as long as there is patience, requests come first."""

from __future__ import annotations

import time

from vlcache_dist.engine.api import EngineStats

POLL_S = 0.05
PATIENCE_S = 2.0  #: for an idle engine: on one that is always busy, nothing would ever be done in the background


def may_begin(stats: EngineStats, since: float) -> bool:
    """Whether work that has waited since ``since`` (``time.monotonic``, seconds) may begin: the engine has neither
    running nor waiting requests, or has had some for longer than ``PATIENCE_S``."""
    return not (stats.running or stats.waiting) or time.monotonic() - since > PATIENCE_S
