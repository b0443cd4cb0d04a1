"""From answers to figures: what every policy got right, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlcache_dist.model.config import TextConfig

HARMFUL_KL = 0.1  #: nats


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case under one policy. ``right``, ``full_right``: the answer's score and a full run's (``scoring.score``),
    shares of 1. ``kl``: of the first token, nats. ``edit``: Levenshtein distance between the policy's and the full
    answer, in tokens. ``computed_share``: token-layers of vision tokens computed, of those of the ``reused_tokens``
    (new pictures are left out); what an escalation threw away is counted too, so it can exceed 1. ``flops``: of the
    prompt's passes from the first picture on. ``alarmed``: a canary was above its limit; ``rechecked``: the answer is
    that of a second pass (or a later one), which moved the first token by ``moved`` nats; ``left``, by layer: how far
    what it computed is from what had been lent. ``escalated``: everything was computed."""

    format: str
    policy: str
    right: float
    full_right: float
    kl: float
    first_token_agrees: bool
    same_answer: bool
    edit: int
    computed_share: float
    escalated: bool
    flops: float
    alarmed: bool = False
    rechecked: bool = False
    moved: float | None = None
    left: list[float] | None = None
    reused_tokens: int = 1

    @property
    def harmful(self) -> bool:
        """What reuse must not do: the first token's distribution is another, or a right answer became a wrong one."""
        return self.kl > HARMFUL_KL or self.full_right >= 0.5 > self.right


def rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Means per format and policy, in order of appearance, and per policy over all cases (format ``all``). The computed
    share is of all vision tokens together: a large picture counts more than a small one."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    everything: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.format, outcome.policy), []).append(outcome)
        everything.setdefault(("all", outcome.policy), []).append(outcome)
    return [_row(*key, group) for key, group in (*groups.items(), *everything.items())]


def _row(format_: str, policy: str, group: Sequence[Outcome]) -> dict[str, Any]:
    table = {name: np.array([asdict(o)[name] for o in group], float) for name in _MEANS}
    means = {title: round(float(table[name].mean()), 6) for name, title in _MEANS.items()}
    tokens = np.array([o.reused_tokens for o in group])
    means["computed_share"] = round(float(np.average(table["computed_share"], weights=np.maximum(tokens, 1))), 6)
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
    "rechecked": "rechecked_share",
    "flops": "flops",
}


def pass_flops(config: TextConfig, token_layers: int, keys: int) -> float:
    """Floating-point operations of ``token_layers`` through attention and MLP, each over ``keys`` keys on average."""
    c, i = config.hidden_size, config.intermediate_size
    kv = config.num_kv_heads * config.head_dim
    weights = c * (c + 2 * kv) + c * c + 3 * c * i
    return float(token_layers) * (2 * weights + 4 * c * keys)
