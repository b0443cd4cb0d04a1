"""How far two runs' first tokens are apart, from the alternatives that sampling reports. Pure."""

from __future__ import annotations

import math

from vlcache_dist.types import TokenLogprobs

ALTERNATIVES = 20  #: of each run


def first_token_drift(full: TokenLogprobs, other: TokenLogprobs) -> tuple[float, bool]:
    """KL(full || other) in nats, and whether both find the same token most likely.

    The sum runs over the tokens that both list, all others being one: merging outcomes can only lower a divergence, so
    this is a lower bound, tight where the listed ones hold nearly all of the probability."""
    p, q = dict(full.top), dict(other.top)
    both = p.keys() & q.keys()
    kl = sum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    rest, other_rest = (max(1.0 - sum(math.exp(x[token]) for token in both), 0.0) for x in (p, q))
    if rest > 1e-9:
        kl += rest * math.log(rest / max(other_rest, 1e-9))
    return max(kl, 0.0), full.top[0][0] == other.top[0][0]
