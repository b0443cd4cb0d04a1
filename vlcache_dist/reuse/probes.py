"""Which tokens of a reused span are computed afresh in every layer to see whether its context changes them. Pure."""

from __future__ import annotations

import numpy as np


def probe_tokens(num_tokens: int, leading: int, strided: int) -> np.ndarray:
    """Indices int64 [<= leading + strided], ascending: the first ``leading`` tokens of a span and the middles of
    ``strided`` equal parts of it, so that a change that concerns only later patches is seen too."""
    first = np.arange(min(leading, num_tokens))
    middles = (2 * np.arange(strided, dtype=np.int64) + 1) * num_tokens // max(2 * strided, 1)
    return np.union1d(first, middles).astype(np.int64)


def with_probes(depths: np.ndarray, probes: np.ndarray, num_layers: int) -> np.ndarray:
    """A plan's ``depths`` int [n] with the probe tokens recomputed in all layers."""
    out = depths.copy()
    out[probes] = num_layers
    return out
