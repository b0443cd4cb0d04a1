"""What the guard may do to a plan: tighten its canary, strengthen it, switch approximation off. Pure."""

from __future__ import annotations

import enum
from dataclasses import replace
from fractions import Fraction

from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.plan import MAX_TOKENS, Guarded, LayerCounts, LayerPercents, Plan, Ramp


class Level(enum.IntEnum):
    """How careful the guard is."""

    NORMAL = 0
    TIGHTENED = 1  #: limits halved, of the canary and of its second pass
    STRENGTHENED = 2  #: limits at a quarter, no second pass, four times the tokens, at least a fifth of the picture
    OFF = 3  #: everything is computed


_TIGHTER = {Level.TIGHTENED: 0.5, Level.STRENGTHENED: 0.25}
_FACTOR, _LEAST = 4, Fraction(20)


def first_step(plan: Plan) -> Level:
    """The level behind NORMAL that changes anything: a plan without canary has nothing to tighten."""
    return Level.TIGHTENED if plan.canary is not None else Level.STRENGTHENED


def plan_at(plan: Plan, level: Level) -> Plan:
    """``plan`` as it is in force at a level; OFF leaves it as it is (the caller computes everything instead)."""
    if level in (Level.NORMAL, Level.OFF):
        return plan
    base, canary = (plan.base, plan.canary) if isinstance(plan, Guarded) else (plan, plan.canary)
    if level is Level.STRENGTHENED:
        base = _stronger(base)
    return base if canary is None else Guarded(base, _scaled(canary, _TIGHTER[level]))


def always_alarmed(plan: Plan) -> Plan:
    """``plan`` with a canary that always calls: reuse is tried, compared, and thrown away before the first token."""
    base = plan.base if isinstance(plan, Guarded) else plan
    canary = Canary(0, 1, ((0, 0.0),)) if plan.canary is None else _scaled(plan.canary, 0.0)
    return Guarded(base, canary)


def _scaled(canary: Canary, factor: float) -> Canary:
    again = canary.again
    if again is not None:
        left = None if again.left is None else (again.left[0], again.left[1] * factor)
        again = replace(again, limit=again.limit * factor, left=left) if factor > _TIGHTER[Level.STRENGTHENED] else None
    return replace(canary, limits=tuple((layer, limit * factor) for layer, limit in canary.limits), again=again)


def _stronger(plan: Plan) -> Plan:
    if isinstance(plan, Ramp):
        return replace(plan, first=_more(plan.first), last=_more(plan.last), minimum=_times(plan.minimum))
    if isinstance(plan, LayerPercents):
        return replace(plan, percents=tuple(_more(percent) for percent in plan.percents))
    assert isinstance(plan, LayerCounts)
    return replace(plan, tokens=tuple(_times(count) for count in plan.tokens))


def _more(percent: Fraction) -> Fraction:
    return min(max(percent * _FACTOR, _LEAST), Fraction(100))


def _times(count: int) -> int:
    return min(count * _FACTOR, MAX_TOKENS)
