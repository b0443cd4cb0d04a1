"""When an answer is right, and how far two next-token distributions are apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlcache_dist.evaluate.cases import Metric

_TOLERANCE = 0.05  #: of ChartQA's relaxed accuracy


def is_right(text: str, answers: Sequence[str], metric: Metric = "exact") -> bool:
    """``exact``: equal to any answer up to case, space and a final full stop. ``relaxed``: numbers may be off by 5 %.
    ``choice``: the first letter that stands alone is the answer."""
    if metric == "choice":
        found = re.search(r"\b([A-H])\b", text)
        return found is not None and found[1] in answers
    said = _plain(text)
    return any(said == _plain(a) or (metric == "relaxed" and _close(said, _plain(a))) for a in answers)


def kl_divergence(full: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(full || other) in nats of log-probabilities [B, vocab] -> [B]."""
    return np.maximum((np.exp(full) * (full - other)).sum(-1), 0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _close(said: str, truth: str) -> bool:
    try:
        a, b = (float(x.rstrip("%").replace(",", "")) for x in (said, truth))
    except ValueError:
        return False
    return abs(a - b) <= _TOLERANCE * abs(b)
