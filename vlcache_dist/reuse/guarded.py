"""The plan of a user who says nothing: ``guarded``. Pure.

Nothing but three strided probes is recomputed; they are watched, and an alarm is verified before everything is computed
(``reuse.canary``). Limits are those that the bundled model's tuning formats gave (docs/reuse.md), at the same relative
depth: probes are judged in the last layer, what a loan leaves at three fifths, and attention is read at four fifths.
For another model they are a guess that the live guard watches over, until ``vlcache-dist calibrate`` has measured them.
"""

from __future__ import annotations

from vlcache_dist.reuse.plan import Plan

GUARDED = "guarded"


def spelled_out(spelling: str, num_layers: int) -> str:
    """``spelling``, or what ``guarded`` stands for in a model of so many layers. Raises InvalidPlan for a plan that is
    malformed or another model's."""
    if spelling == GUARDED:
        again = f"again:4@{num_layers * 4 // 5}<0.005x2,left:{num_layers * 3 // 5}<0.33"
        spelling = f"none+canary:0,3,{num_layers - 1}<0.19,{again}"
    plan = Plan.parse(spelling)
    plan.counts(1, num_layers)
    return str(plan)
