"""Calibration of the second pass behind an alarm: which layer's attention chooses tokens, how many, how far the first
token may move; and what a second pass behind *every* first one is worth at a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from vlcache_dist.evaluate.names import ALWAYS, second_pass
from vlcache_dist.evaluate.report import Outcome
from vlcache_dist.reuse.calibrate import LARGEST_MOVE, ReleaseChoice, choose_left, choose_release, release_bound
from vlcache_dist.reuse.canary import Again, Canary

PERCENTS = (2.0, 3.0, 5.0, 10.0)  #: of the suspicious spans' tokens: what is tried behind an alarm
_STRICTER = (1.0, 0.3, 0.1)  #: of the limit, for a third pass: a case has two chances there to look as if it were right
_MOVES = (LARGEST_MOVE, 0.03, 0.01, 0.003)  #: nats; what moved less and is wrong is told by what is left, if it can be
_NEVER = 1000.0  #: a canary's limit that nothing exceeds

Measure = Callable[[Sequence[str]], dict[str, list[Outcome]]]  #: by spelling, in the same order of cases
Row = dict[str, Any]


def choose_second_pass(
    measure: Measure, base: str, canary: Canary, layers: Sequence[int], bound: float
) -> tuple[Again | None, dict[str, Any]]:
    """Of the shares ``PERCENTS`` and ``layers`` the second pass that computes least on average over the cases, with a
    limit that releases at most the share ``bound`` of the harmful ones and, where its answers can be wrong without
    having moved, a limit of what may be left; with a third pass if that computes less and releases no more than may
    be. None where computing everything is cheaper. And for the record what it does and costs. ``base``: the spelling
    of the first pass' plan. ``harmful`` of a case is what the first pass, unwatched, would have done."""
    unwatched = f"{base}+{replace(canary, limits=tuple((layer, _NEVER) for layer, _ in canary.limits))}"
    watched = f"{base}+{canary}"
    found = {(p, n): f"{watched},{Again(p, n, ALWAYS)}" for p in PERCENTS for n in layers}
    outcomes = measure([unwatched, watched, *found.values()])
    first = _shares(outcomes[unwatched])
    everything = _shares(outcomes[watched]) - first
    harmful = int(sum(o.harmful for o in outcomes[unwatched]))
    alarms = np.array([o.alarmed for o in outcomes[watched]])
    missed = int(sum(o.harmful for o in outcomes[watched]))
    tried: list[tuple[float, Again, ReleaseChoice, np.ndarray]] = []
    for (percent, layer), spelling in found.items():
        moved = np.array([np.nan if o.moved is None else o.moved for o in outcomes[spelling]])
        harms = np.array([o.harmful for o in outcomes[spelling]])
        left = np.array([o.left for o in outcomes[spelling] if o.left is not None]).T  # of those that alarmed
        again = _shares(outcomes[spelling]) - first
        limits = []
        for most in _MOVES:
            fit = choose_left(left, moved[alarms], harms[alarms], most)
            fits = np.ones(len(moved), bool)
            if fit is not None:
                fits[alarms] = left[fit[0]] <= fit[1]
            choice = choose_release(moved[alarms & fits], harms[alarms & fits], harmful, bound, most)
            computed = first + again + np.where(alarms & ~(fits & (moved <= choice.limit)), everything, 0.0)
            limits.append((float(computed.mean()), Again(percent, layer, choice.limit, left=fit), choice, computed))
        tried.append(min(limits, key=lambda one: one[0]))
    cost, again_, choice, computed = min(tried, key=lambda one: one[0])
    allowed = max(choice.released_harmful, int(bound * harmful))
    for part in _STRICTER if choice.released else ():
        thrice = replace(again_, passes=2, limit=round(again_.limit * part, 6))
        more = measure([f"{watched},{thrice}"])[f"{watched},{thrice}"]
        released = np.array([o.rechecked for o in more])
        wrong = int(sum(o.harmful for o in more if o.rechecked))
        judged = ReleaseChoice(thrice.limit, int(released.sum()), wrong, release_bound(wrong, harmful))
        tried.append((float(_shares(more).mean()), thrice, judged, _shares(more)))
        if wrong <= allowed:
            if tried[-1][0] < cost:
                cost, again_, choice, computed = tried[-1]
            break
    without = float((first + everything).mean())
    record = {
        "bound": bound,
        "cases": len(alarms),
        "harmful": harmful,
        "missed_by_the_canary": missed,
        "alarms": int(alarms.sum()),
        **asdict(choice),
        "computed_share": round(cost, 4),
        "computed_share_without": round(without, 4),
        "computed_share_calm": _mean(computed[~alarms]),
        "computed_share_alarmed": _mean(computed[alarms]),
        "tried": [
            {"again": str(one), "computed_share": round(share, 4), **asdict(what)} for share, one, what, _ in tried
        ],
    }
    return (again_ if choice.released and cost < without else None), record


def best_repair(
    rows: Callable[[Sequence[str]], dict[str, Row]], layers: Sequence[int], budget: float, percents: Sequence[float]
) -> dict[str, Any]:
    """The plan with the least KL that always makes a second pass and computes at most ``budget`` percent of the
    token-layers (as many as first-k does: no picture can have less than a token), beside first-k and CacheBlend-style;
    ``policy``: its spelling. ``rows``: means by spelling."""
    tried = [second_pass(percent, layer) for percent in percents if percent <= budget for layer in layers]
    compared = [f"uniform:{budget:g}", f"blend:{budget:g}"]
    found = rows(["none", *tried, *compared])
    room = found[compared[0]]["computed_share"]
    affordable = {name: found[name]["kl"] for name in tried if found[name]["computed_share"] <= room + 1e-9}
    best = min(affordable, key=lambda name: affordable[name]) if affordable else "none"
    shown = ("kl", "exact_match", "computed_share")
    return {"policy": best, **{name: {k: found[name][k] for k in shown} for name in (best, "none", *compared)}}


def _shares(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([o.computed_share for o in outcomes])


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
