"""Streamed passes of a tensor-parallel worker: every rank goes up the layers by the same groups, in the same order.

A group has arrived when it has on every rank (``parallel.transport``), so the leader's word is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.runner import Pass
from vlcache_dist.engine.streaming import LayeredPass, Streamer
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.parallel.runner import ShardedPass, ShardedRunner
from vlcache_dist.types import SamplingParams


class ShardedLayers:
    """See ``engine.streaming.LayeredPass``; on all ranks. Every method raises WorkerLost once a rank is lost."""

    def __init__(self, own: LayeredPass, group: ShardGroup) -> None:
        self._own = own
        self._group = group

    def run(self, start: int, stop: int) -> None:
        """See ``LayeredPass.run``."""
        with self._group.in_step():
            self._group.post(p.RunLayers(start, stop))
            self._own.run(start, stop)

    def finish(self, params: Sequence[SamplingParams], draws: Sequence[int]) -> Pass:
        """See ``LayeredPass.finish``."""
        with self._group.in_step():
            return ShardedPass(self._own.finish(params, draws), self._group)


class ShardedStreamer(Streamer):
    """Rank 0's. ``graphs`` as the runner's."""

    def __init__(self, runner: ShardedRunner, group: ShardGroup, *, graphs: bool = False) -> None:
        super().__init__(runner, graphs=graphs)
        self._group = group

    def begin(self, step: StepBatch, edges: tuple[int, ...]) -> LayeredPass:
        """See ``Streamer.begin``."""
        with self._group.in_step():
            self._group.post(p.BeginLayers(step, edges))
            return ShardedLayers(super().begin(step, edges), self._group)

    def prepare(self) -> bool:
        """See ``Streamer.prepare``."""
        if self._graphs is None:
            return False
        with self._group.in_step():
            self._group.post(p.PrepareLayers())
            return super().prepare()

    def erase(self, slots: np.ndarray) -> None:
        """See ``Streamer.erase``."""
        with self._group.in_step():
            self._group.post(p.Erase(slots))
            super().erase(slots)
