"""The canary: a few tokens that are computed afresh tell whether a context changes what a picture's tokens carry. Pure.

The statistic of a reused span in layer l is ``max over probe tokens of |V fresh - V cached| / |V cached|`` (norms over
all KV heads). It is compared with a limit in the layers that calibration chose; above any of them, no small plan will
do, and the span with everything behind it is computed in full. See docs/reuse.md for what it was measured to miss.

Spelling, behind a plan's: ``none+canary:1,2,5<0.31,6<0.4``: one leading and two strided probe tokens, limits of
layers 5 and 6. A limit of 0 is always exceeded: reuse is tried, compared and thrown away.

``...,again:10@8<0.05`` behind the limits: an alarm is first checked by a second pass. What the probes gained is lent to
the other tokens of their span (rank one, in every layer), and the 10 % of the suspicious vision tokens that the
prompt's last token attends to most in layer 8 are computed as well. If the first token's distribution moves by no more
than 0.05 nats (KL of the second pass against the first), the second answer is released.

``...,again:10@8<0.05x2``: an answer that moved is given another pass, with 10 % more tokens, chosen by what the last
pass attended to, and compared with that one; and so on, so many passes in all, before everything is computed.

``...,again:10@8<0.05,left:7<0.35``: the loan is only as good as its premise, that a context moves all tokens of a
picture alike. The tokens that a second pass computes tell: if in layer 7 their V deviates from what was lent by more
than 0.35 of it on average, nothing is released, and everything is computed at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.reuse.probes import probe_tokens

MAX_PROBES = 4096
MAX_LIMIT = 1000.0
_NUMBER = re.compile(r"[0-9]{1,4}")
_LIMIT = re.compile(r"([0-9]{1,4})<([0-9]{1,4}(?:\.[0-9]{1,6})?)")
_AGAIN = re.compile(r"again:([0-9]{1,3}(?:\.[0-9]{1,6})?)@([0-9]{1,4})<([0-9]{1,4}(?:\.[0-9]{1,6})?)(?:x([2-9]))?")
_LEFT = re.compile(r"left:([0-9]{1,4})<([0-9]{1,4}(?:\.[0-9]{1,6})?)")


@dataclass(frozen=True, slots=True)
class Again:
    """The second pass behind an alarm: ``percent`` of the suspicious spans' tokens, chosen by the attention paid to
    them in ``layer``; ``limit`` in nats; at most so many ``passes`` behind the first one. ``left``: (layer, limit) of
    the deviation that may be left between what was lent and what is computed over it; None: any."""

    percent: float
    layer: int
    limit: float
    passes: int = 1
    left: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise InvalidPlan(f"canary again:{self.percent:g}: must be more than 0 and at most 100 percent")
        if not 1 <= self.passes <= 9:
            raise InvalidPlan(f"canary again: {self.passes} passes; must be 1 to 9")
        for limit in (self.limit, *(self.left or (0, 0.0))[1:]):
            if not 0 <= limit < 10_000:
                raise InvalidPlan(f"canary again: limit {limit}; must be at least 0 and less than 10,000")

    def count(self, num_tokens: int) -> int:
        """How many of so many tokens."""
        return min(num_tokens, math.ceil(num_tokens * self.percent / 100 - 1e-9))

    def fits(self, left: np.ndarray) -> bool:
        """``left`` fp [layer]: the mean of |V fresh - V lent| / |V lent| over the tokens computed. What is not finite
        does not fit."""
        if self.left is None:
            return True
        layer, limit = self.left
        return bool(np.isfinite(left[layer]) and left[layer] <= limit)

    def __str__(self) -> str:
        more = f"x{self.passes}" if self.passes > 1 else ""
        left = f",left:{self.left[0]}<{_decimal(self.left[1])}" if self.left is not None else ""
        return f"again:{_decimal(self.percent)}@{self.layer}<{_decimal(self.limit)}{more}{left}"


@dataclass(frozen=True, slots=True)
class Canary:
    """``leading`` and ``strided`` probe tokens (``probes.probe_tokens``), and (layer, limit) pairs in layer order."""

    leading: int
    strided: int
    limits: tuple[tuple[int, float], ...]
    again: Again | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.leading + self.strided <= MAX_PROBES:
            raise InvalidPlan(f"canary with {self.leading + self.strided} probe tokens: must be 1 to {MAX_PROBES}")
        if not self.limits:
            raise InvalidPlan("canary without a limit: give at least one, as in 5<0.31")
        layers = [layer for layer, _ in self.limits]
        if layers != sorted(set(layers)):
            raise InvalidPlan(f"canary limits of layers {layers}: every layer once, in ascending order")
        for layer, limit in self.limits:
            if not 0 <= limit <= MAX_LIMIT:
                raise InvalidPlan(f"canary limit {limit} of layer {layer}: must be 0 (always alarms) to {MAX_LIMIT:g}")

    @classmethod
    def parse(cls, text: str) -> Canary:
        """What follows ``canary:`` in a spelling. Raises InvalidPlan."""
        leading, strided, *limits = ([*text.split(","), "", ""])[: max(2, text.count(",") + 1)]
        left = _LEFT.fullmatch(limits[-1]) if len(limits) > 1 else None
        again = _AGAIN.fullmatch(limits[-2 if left else -1]) if limits else None
        if again is not None:
            del limits[-2 if left else -1 :]
        if not (_NUMBER.fullmatch(leading) and _NUMBER.fullmatch(strided)):
            raise InvalidPlan(f"canary {text!r}: expected LEADING,STRIDED,LAYER<LIMIT,...")
        pairs = []
        for item in limits:
            found = _LIMIT.fullmatch(item)
            if found is None:
                raise InvalidPlan(f"canary {text!r}: {item!r} is not LAYER<LIMIT, as in 5<0.31")
            pairs.append((int(found[1]), float(found[2])))
        second = None
        if again is not None:
            fit = None if left is None else (int(left[1]), float(left[2]))
            second = Again(float(again[1]), int(again[2]), float(again[3]), int(again[4] or 1), fit)
        return cls(int(leading), int(strided), tuple(pairs), second)

    def __str__(self) -> str:
        limits = ",".join(f"{layer}<{_decimal(limit)}" for layer, limit in self.limits)
        return f"canary:{self.leading},{self.strided},{limits}" + (f",{self.again}" if self.again else "")

    def probes(self, num_tokens: int) -> np.ndarray:
        """Probe tokens of a span: int64, ascending."""
        return probe_tokens(num_tokens, self.leading, self.strided)

    def excess(self, ratios: np.ndarray) -> float:
        """``ratios`` [layer, probe] of one span -> the largest statistic in units of its limit; above 1 is an alarm.
        A limit of 0 and NaN count as alarm (infinity): KV that is not finite is not to be trusted."""
        if not np.isfinite(ratios).all() or any(limit == 0 for _, limit in self.limits):
            return float("inf")
        return max(float(ratios[layer].max()) / limit for layer, limit in self.limits)

    def check_layers(self, num_layers: int) -> None:
        """Raise InvalidPlan if a limit is of a layer that the model does not have."""
        if self.limits[-1][0] >= num_layers:
            raise InvalidPlan(f"canary limit of layer {self.limits[-1][0]}: the model has {num_layers} layers")
        if self.again is not None and self.again.layer >= num_layers:
            raise InvalidPlan(f"canary again in layer {self.again.layer}: the model has {num_layers} layers")
        if self.again is not None and self.again.left is not None and self.again.left[0] >= num_layers:
            raise InvalidPlan(f"canary left in layer {self.again.left[0]}: the model has {num_layers} layers")


def _decimal(value: float) -> str:
    return format(Decimal(f"{value:.6f}").normalize(), "f")
