"""What a canary sees: fresh V of probe tokens in the pages against the V that the span was reused from; behind an
alarm, fresh V of all that a later pass computed against what had been lent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlcache_dist.engine.runner import Runner
from vlcache_dist.kv.object_store import Extent


@dataclass(frozen=True, slots=True)
class Watched:
    """A reused span that is being watched. ``tokens`` int64 [p]: tokens of the span, computed in every layer, whose
    page slots are ``slots`` int64 [p]. ``kv``, what they are compared with, must be held until the look is taken."""

    index: int
    length: int
    kv: Extent
    tokens: np.ndarray
    slots: np.ndarray


class Look:
    """Deviations on the device, enqueued behind the pass that computes the tokens; ``ratios`` waits for them."""

    def __init__(self, runner: Runner, spans: Sequence[Watched]) -> None:
        self.spans = spans
        extents = [(s.kv.offset, s.length) for s in spans]
        slots = np.concatenate([s.slots for s in spans])
        changed, cached = runner.compare(extents, [s.tokens for s in spans], slots)
        self._ratios = changed.sqrt() / cached.sqrt().clamp_min(1e-12)

    def ratios(self) -> list[np.ndarray]:
        """|fresh - cached| / |cached| of V, fp32 [layer, p] per span."""
        counts = np.cumsum([len(s.tokens) for s in self.spans])[:-1]
        return np.split(self._ratios.cpu().numpy(), counts, axis=1)
