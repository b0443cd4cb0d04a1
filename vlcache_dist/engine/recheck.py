"""The second pass behind an alarm: which tokens it computes besides, and whether it changed the answer.

What must be right of a stale picture depends on the question, and the question's own attention tells: the tokens that
the prompt's last position looks at are computed afresh over the stale rest. If the first token's distribution stays
where it was, the alarm was about something that this question does not touch. See docs/reuse.md for what that misses.
"""

from __future__ import annotations

import numpy as np
import torch

from vlcache_dist.engine.api import Reuse
from vlcache_dist.engine.batch import ChunkWork, build_step
from vlcache_dist.engine.runner import Runner
from vlcache_dist.engine.sequence import Sequence
from vlcache_dist.reuse.canary import Again


def last_row(runner: Runner, sequence: Sequence, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a prompt whose KV is in the pages: log-probabilities fp32 [vocab] of the token behind it, and the attention
    fp32 [prompt] that its last position pays in ``layer``. Waits for the device."""
    layout, stop = runner.arena.layout, sequence.num_prompt
    chunk = ChunkWork(
        sequence.tokens,
        sequence.positions,
        sequence.block_table,
        stop - 1,
        stop,
        sample=True,
        slots=sequence.slots(0, sequence.capacity),
    )
    step = build_step(
        [chunk],
        num_layers=layout.num_layers,
        block_size=sequence.block_size,
        kv_row=layout.kv_row,
        hidden=layout.hidden,
    )
    logits, paid = runner.reread(step, layer, sequence.slots(0, stop))
    return torch.log_softmax(logits, -1).cpu().numpy(), paid.cpu().numpy()


def attended(sequence: Sequence, first: int, again: Again, paid: np.ndarray) -> dict[int, np.ndarray]:
    """Tokens (int64, ascending) by span, from span ``first`` on: of those that reuse left stale, the ones that ``paid``
    fp32 [prompt] is highest for. Ties go to earlier ones."""
    places, tokens, total = [], [], 0
    for index in range(first, len(sequence.spans)):
        state = sequence.spans[index]
        if not sequence.suspicious(index) or not isinstance(state.source, Reuse):
            continue
        total += state.span.length - state.cached
        stale = state.cached + np.flatnonzero(state.source.depths[state.cached :] < sequence.num_layers)
        places.append(np.full(len(stale), index))
        tokens.append(stale)
    where, which = np.concatenate(places), np.concatenate(tokens)
    starts = np.array([state.span.start for state in sequence.spans])
    order = np.argsort(-paid[starts[where] + which], kind="stable")[: again.count(total)]
    return {int(index): np.sort(which[order][where[order] == index]) for index in np.unique(where[order])}


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """KL in nats of the second pass' distribution against the first's: sum of p2 (log p2 - log p1), log-probabilities
    fp32 [vocab] each; infinity where either is not finite."""
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return float("inf")
    return float((np.exp(after.astype(np.float64)) * (after.astype(np.float64) - before)).sum())
