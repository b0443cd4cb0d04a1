"""What an engine has done since its start, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Values

import numpy as np

from vlcache_dist.engine.api import EngineStats
from vlcache_dist.engine.batch import ChunkWork, StepBatch
from vlcache_dist.engine.sequence import Sequence
from vlcache_dist.kv.paged_pool import PagedPool
from vlcache_dist.kv.prefix_cache import PrefixCache


class Accounts:
    """``counters`` are those of ``EngineStats``, by name."""

    def __init__(self, num_layers: int) -> None:
        self.counters: Counter[str] = Counter()
        self._num_layers = num_layers
        self._layer_rows = np.zeros(num_layers, np.int64)
        self._layer_query_rows = np.zeros(num_layers, np.int64)

    def count(self, work: Values[tuple[Sequence, ChunkWork]], batch: StepBatch) -> None:
        """A pass that is done: its rows, and for each sequence the token-layers that were computed of its prompt."""
        self._layer_rows += batch.rows_kv
        self._layer_query_rows += batch.rows_q
        self.counters["steps"] += 1
        self.counters["scattered_tokens"] += len(batch.scatter_src)
        layers = np.minimum(batch.row_depth, self._num_layers)
        self.counters["vision_layer_rows"] += int(layers[batch.embed_rows].sum())
        rows = np.bincount(batch.row_chunk, weights=layers, minlength=len(work))
        for (sequence, chunk), count in zip(work, rows.tolist(), strict=True):
            if sequence.prefilling:
                sequence.computed_rows += int(count)
                self.counters["prompt_tokens"] += chunk.end - chunk.start

    def stats(
        self,
        pool: PagedPool,
        cache: PrefixCache,
        *,
        spans_reused: int,
        waiting: int,
        running: int,
        parked: int,
        waiting_tokens: int,
    ) -> EngineStats:
        """Counters, and gauges of this moment."""
        prefix = cache.stats()
        names = (
            *("steps", "finished", "aborted", "failed", "prompt_tokens", "generated_tokens", "scattered_tokens"),
            *(
                "spans_recorded",
                "spans_watched",
                "spans_escalated",
                "spans_rechecked",
                "vision_layer_rows",
                "spans_streamed",
                "spans_revoked",
            ),
        )
        return EngineStats(
            waiting=waiting,
            running=running,
            parked=parked,
            waiting_tokens=waiting_tokens,
            blocks_free=pool.num_free,
            blocks_total=pool.num_blocks,
            exact_hit_tokens=prefix.exact_hit_tokens,
            approx_hit_tokens=prefix.approx_hit_tokens,
            spans_reused=spans_reused,
            layer_rows=tuple(self._layer_rows.tolist()),
            layer_query_rows=tuple(self._layer_query_rows.tolist()),
            **{name: self.counters[name] for name in names},
        )
