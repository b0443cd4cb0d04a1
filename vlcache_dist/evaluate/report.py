"""From answers to figures: what every policy got right, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlcache_dist.model.config import TextConfig


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case under one policy. ``kl``: of the first token, nats. ``edit``: Levenshtein distance between the policy's
    and the full answer, in tokens. ``computed_share``: token-layers of vision tokens computed, of those of all
    pictures, new ones left out; what an escalation threw away is counted too, so it can exceed 1. ``flops``: of the
    prompt's pass from the first picture on."""

    format: str
    policy: str
    right: bool
    full_right: bool
    kl: float
    first_token_agrees: bool
    same_answer: bool
    edit: int
    computed_share: float
    escalated: bool
    flops: float


def rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Means per format and policy, in order of appearance, and per policy over all cases (format ``all``)."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    everything: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.format, outcome.policy), []).append(outcome)
        everything.setdefault(("all", outcome.policy), []).append(outcome)
    return [_row(*key, group) for key, group in (*groups.items(), *everything.items())]


def _row(format_: str, policy: str, group: Sequence[Outcome]) -> dict[str, Any]:
    table = {name: np.array([asdict(o)[name] for o in group], float) for name in _MEANS}
    means = {title: round(float(table[name].mean()), 6) for name, title in _MEANS.items()}
    return {"format": format_, "policy": policy, "cases": len(group), **means}


_MEANS = {
    "right": "exact_match",
    "full_right": "full_exact_match",
    "kl": "kl",
    "first_token_agrees": "first_token_agreement",
    "same_answer": "same_answer",
    "edit": "edit_distance",
    "computed_share": "computed_share",
    "escalated": "escalated_share",
    "flops": "flops",
}


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein distance."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def pass_flops(config: TextConfig, token_layers: int, keys: int) -> float:
    """Floating-point operations of ``token_layers`` through attention and MLP, each over ``keys`` keys on average."""
    c, i = config.hidden_size, config.intermediate_size
    kv = config.num_kv_heads * config.head_dim
    weights = c * (c + 2 * kv) + c * c + 3 * c * i
    return float(token_layers) * (2 * weights + 4 * c * keys)
