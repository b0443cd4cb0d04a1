"""The runner of a tensor-parallel worker: what it is told, it tells the followers, and then does on its own shard.

The ranks agree because they are told the same in the same order. Rank 0 alone draws tokens. Where the others' work
must be over, and not just enqueued, they confirm it: extents are handed out or reused on this rank's word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.lazy import Traffic
from vlcache_dist.engine.runner import Pass, Runner
from vlcache_dist.kv.arena import Arena
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.model.parallel import LanguageShard
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.types import SamplingParams, TokenLogprobs


class ShardedPass(Pass):
    """A forward pass under way on all ranks."""

    def __init__(self, own: Pass, group: ShardGroup) -> None:
        self._own = own
        self._group = group

    def result(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """See ``Pass.result``; on every rank: a sampled row goes through the last layer's sums, behind all that any
        rank wrote, and a pass without one ends with ``synchronize``. Raises WorkerLost."""
        with self._group.in_step():
            return self._own.result()


class ShardedRunner(Runner):
    """Rank 0's. ``pages`` and ``arena`` are this rank's shard; the followers make theirs alike. ``graphs``: every rank
    captures the same passes at the same steps, the sums in them. Every method raises WorkerLost once a rank is lost."""

    def __init__(
        self, model: LanguageShard, pages: torch.Tensor, arena: Arena, group: ShardGroup, *, graphs: bool = False
    ) -> None:
        """Have the followers make their pages. Raises WorkerLost, or what a follower failed with."""
        super().__init__(model, pages, arena, graphs=graphs)
        self._group = group
        group.post(p.Allocate(pages.shape[2], pages.shape[3], graphs))
        group.confirm(p.Ok)

    def launch(self, step: StepBatch, params: Sequence[SamplingParams], draws: Sequence[int]) -> Pass:
        """See ``Runner.launch``."""
        with self._group.in_step():
            self._group.post(p.Launch(step))
            return ShardedPass(super().launch(step, params, draws), self._group)

    def expect(self, traffic: Traffic) -> None:
        """See ``Runner.expect``."""
        with self._group.in_step():
            self._group.post(p.Expect(traffic))
            super().expect(traffic)

    def prepare(self) -> bool:
        """See ``Runner.prepare``."""
        if self._graphs is None:
            return False
        with self._group.in_step():
            self._group.post(p.Prepare())
            return super().prepare()

    def pack(self, slots: np.ndarray, staging: Extent) -> None:
        """See ``Runner.pack``."""
        with self._group.in_step():
            self._group.post(p.Pack(slots, staging.offset, staging.elements))
            super().pack(slots, staging)  # ends with ``synchronize``

    def unpack(self, staging: Extent, slots: np.ndarray) -> None:
        """See ``Runner.unpack``."""
        with self._group.in_step():
            self._group.post(p.Unpack(slots, staging.offset, staging.elements))
            super().unpack(staging, slots)

    def scatter(self, src: np.ndarray, span_tokens: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """See ``Runner.scatter``."""
        with self._group.in_step():
            self._group.post(p.Scatter(src, span_tokens, slots, positions))
            super().scatter(src, span_tokens, slots, positions)

    def compare(
        self, extents: Sequence[tuple[int, int]], probes: Sequence[np.ndarray], slots: np.ndarray
    ) -> torch.Tensor:
        """See ``Runner.compare``: over the KV heads of all ranks."""
        with self._group.in_step():
            self._group.post(p.Compare(tuple(extents), tuple(probes), slots))
            return self._group.collective.all_reduce(super().compare(extents, probes, slots))

    def reread(self, step: StepBatch, layer: int, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Runner.reread``: attention over the heads of all ranks."""
        with self._group.in_step():
            self._group.post(p.Reread(step, layer, slots))
            logits, paid = super().reread(step, layer, slots)
            return logits, self._group.collective.all_reduce(paid)

    def lend(
        self,
        extent: tuple[int, int],
        probes: np.ndarray,
        slots: np.ndarray,
        positions: np.ndarray,
        target: Extent,
    ) -> None:
        """See ``Runner.lend``: every rank for its own heads."""
        with self._group.in_step():
            self._group.post(p.Lend(extent, probes, slots, positions, target.offset, target.elements))
            super().lend(extent, probes, slots, positions, target)

    def store_embeddings(self, rows: torch.Tensor, extent: Extent) -> None:
        """See ``Runner.store_embeddings``: on every rank."""
        with self._group.in_step():
            self._group.post(p.StoreEmbeddings(extent.offset, len(rows)))
            view = self.arena.embedding_view(extent, len(rows))
            view.copy_(rows)
            self._group.collective.broadcast(view)
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for every rank's device."""
        with self._group.in_step():
            self._group.post(p.Synchronize())
            super().synchronize()
            self._group.confirm(p.Ok)

    def on_lost(self, tell: Callable[[BaseException], None]) -> None:
        """See ``Runner.on_lost``: a follower."""
        self._group.on_lost(tell)

    def close(self) -> None:
        """End the followers."""
        self._graphs = None  # they hold on to the collectives that they captured
        self._group.close()
