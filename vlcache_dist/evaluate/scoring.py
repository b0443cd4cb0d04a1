"""When an answer is right, and how far two next-token distributions are apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlcache_dist.evaluate.cases import Metric

_TOLERANCE = 0.05  #: of ChartQA's relaxed accuracy


def score(text: str, answers: Sequence[str], metric: Metric = "exact") -> float:
    """0 to 1. ``exact``: 1 if equal to any answer up to case, space and a final full stop. ``relaxed`` (ChartQA):
    numbers may be off by 5 %. ``choice`` (MMBench): the first letter that stands alone is the answer. ``anls``
    (DocVQA; arXiv 1905.13648): 1 less the edit distance over the longer one's length, 0 from one half on, best of the
    answers. ``vqa`` (TextVQA; arXiv 1505.00468): three people who say the same make it right; mean over all but one."""
    said = _plain(text)
    if metric == "choice":
        found = re.search(r"\b([A-H])\b", text)
        return float(found is not None and found[1] in answers)
    if metric == "anls":
        return max((_similar(said, _plain(answer)) for answer in answers), default=0.0)
    if metric == "vqa":
        same, people = sum(said == _plain(answer) for answer in answers), max(len(answers), 1)
        return (same * min(1.0, (same - 1) / 3) + (people - same) * min(1.0, same / 3)) / people
    return float(any(said == _plain(a) or (metric == "relaxed" and _close(said, _plain(a))) for a in answers))


def is_right(text: str, answers: Sequence[str], metric: Metric = "exact") -> bool:
    """A score of one half or more."""
    return score(text, answers, metric) >= 0.5


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Levenshtein distance."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def kl_divergence(full: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(full || other) in nats of log-probabilities [B, vocab] -> [B]."""
    return np.maximum((np.exp(full) * (full - other)).sum(-1), 0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _similar(said: str, truth: str) -> float:
    distance = edit_distance(said, truth) / max(len(said), len(truth), 1)
    return 1 - distance if distance < 0.5 else 0.0


def _close(said: str, truth: str) -> bool:
    try:
        a, b = (float(x.rstrip("%").replace(",", "")) for x in (said, truth))
    except ValueError:
        return False
    return abs(a - b) <= _TOLERANCE * abs(b)
