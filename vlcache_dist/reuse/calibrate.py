"""From measured cases to a canary's limit and a plan. Pure: arrays in, choices out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np

from vlcache_dist.reuse.evidence import wilson_upper

EXTRA_FALSE_ALARMS = 0.05  #: share of harmless cases that another layer, or of alarms that a wider margin, may cost
ABOVE = 0.01  #: share of right answers that need not stay below a limit of what is left
LARGEST_MOVE = 0.1  #: nats; a first token that a second pass moves further is another one
_ALIKE = 1e-9  #: variance of logarithms below which values are all the same
_SMALLEST_MOVE = 1e-3  #: nats; moves below it are equal


@dataclass(frozen=True, slots=True)
class LimitChoice:
    """``caught``: share of harmful cases above ``limit`` in ``layer``; ``false_alarms``: share of harmless ones."""

    layer: int
    limit: float
    caught: float
    false_alarms: float


def choose_limit(statistics: np.ndarray, harmful: np.ndarray, catch: float = 0.99) -> LimitChoice:
    """The first of ``limit_choices``."""
    return limit_choices(statistics, harmful, catch)[0]


def limit_choices(statistics: np.ndarray, harmful: np.ndarray, catch: float = 0.99) -> list[LimitChoice]:
    """Layers and limits of a canary, best first. ``statistics`` fp [layer, case] is a case's largest deviation,
    ``harmful`` bool [case].

    Deviations come in two kinds: of pictures that kept their role and of those whose role changed. Whether a change
    does harm is the question's luck, so a limit drawn between harmful and harmless cases lies among the second kind,
    and misses the next format's. Hence per layer the limit lies between the two kinds (``split``), or lower, where
    less than the share ``catch`` of the harmful cases exceeds that. First come layers whose split catches by itself,
    each group in the order of how much of the variance the split explains; layers with many more false alarms than
    the first of them are left out. Raises ValueError without harmful or harmless cases: no limit follows from one kind.
    """
    if not harmful.any() or harmful.all():
        raise ValueError(f"{int(harmful.sum())} of {len(harmful)} cases are harmful: both kinds are needed")
    found: list[tuple[bool, float, LimitChoice]] = []
    for layer, values in enumerate(np.maximum(statistics, 1e-9)):
        bad, good = np.sort(values[harmful]), values[~harmful]
        ceiling = float(bad[int(np.floor((1 - catch) * len(bad) + 1e-9))])
        between, explained = split(values)
        limit = _down(min(between, ceiling * (1 - 1e-4)))
        choice = LimitChoice(layer, limit, float((bad > limit).mean()), float((good > limit).mean()))
        found.append((explained > 0 and between < ceiling, explained, choice))
    best, *others = [choice for _, _, choice in sorted(found, key=lambda one: one[:2], reverse=True)]
    return [best, *(one for one in others if one.false_alarms <= best.false_alarms + EXTRA_FALSE_ALARMS)]


def split(values: np.ndarray) -> tuple[float, float]:
    """Where positive ``values`` fp [case], at least two, fall into two kinds: the place that explains most of the
    variance of their logarithms, and the share that it explains (Otsu, IEEE Trans. SMC 9(1), 1979)."""
    logs = np.sort(np.log(values))
    count, below = len(logs), np.arange(1, len(logs))
    sums = np.cumsum(logs)[:-1]
    apart = sums / below - (logs.sum() - sums) / (count - below)
    between = below * (count - below) * apart**2 / count**2
    at = int(between.argmax())
    variance = float(logs.var())
    explained = float(between[at]) / variance if variance > _ALIKE else 0.0
    return float(np.exp((logs[at] + logs[at + 1]) / 2)), explained


def choose_left(
    left: np.ndarray, moved: np.ndarray, harms: np.ndarray, most: float = LARGEST_MOVE
) -> tuple[int, float] | None:
    """Layer and limit of the deviation ``left`` fp [layer, alarm] over what was lent. Above it are all answers of a
    second pass that are wrong (``harms`` bool [alarm]) although they ``moved`` fp [alarm] by no more than ``most``
    nats, which the first token's distribution cannot tell. It is the geometric mean of the least of these and of what
    all but ``ABOVE`` of the right answers stay below, in the layer where these two are furthest apart; just below the
    former where they overlap. None where there is no such answer, or no right one."""
    silent = harms & (moved <= most)
    if not silent.any() or harms.all():
        return None
    wrong = left[:, silent].min(1)
    right = np.maximum(np.quantile(left[:, ~harms], 1 - ABOVE, axis=1), 1e-6)
    layer = int(np.argmax(wrong / right))
    limit = np.sqrt(wrong[layer] * min(right[layer], wrong[layer])) * (1 - 1e-4)
    return layer, _down(float(limit))


@dataclass(frozen=True, slots=True)
class ReleaseChoice:
    """A second pass' limit in nats, and what it does to the alarms it was drawn from: ``released`` of them, of which
    ``released_harmful`` were wrong. ``at_most``: the share of harmful cases that may be released in truth (Wilson,
    one-sided 95 %)."""

    limit: float
    released: int
    released_harmful: int
    at_most: float


def choose_release(
    moved: np.ndarray, harms: np.ndarray, harmful_cases: int, bound: float, most: float = LARGEST_MOVE
) -> ReleaseChoice:
    """``moved`` fp [alarm]: nats by which the second pass moved the first token; ``harms`` bool [alarm]: its answer is
    wrong. The limit releases at most ``bound * harmful_cases`` wrong answers and never one that moved by more than
    ``most``; below that it lies in the widest relative gap that costs at most ``EXTRA_FALSE_ALARMS`` of the
    alarms, since a limit that touches the cases it was drawn from lets their like pass. 0, and nothing released, where
    wrong answers do not move."""
    allowed = int(np.floor(bound * harmful_cases + 1e-9))
    wrong = np.sort(moved[harms])
    ceiling = min(float(wrong[allowed]) if allowed < len(wrong) else most, most)
    if ceiling <= _SMALLEST_MOVE:  # what is wrong does not move: nothing can be told
        return ReleaseChoice(0.0, 0, 0, release_bound(0, harmful_cases))
    below = np.sort(np.maximum(moved[moved < ceiling], _SMALLEST_MOVE))[::-1]
    upper, gap, limit = ceiling, 0.0, ceiling * (1 - 1e-6)
    for cut, lower in enumerate([*below.tolist(), _SMALLEST_MOVE]):
        if cut > EXTRA_FALSE_ALARMS * len(moved):
            break
        if np.log(upper / lower) > gap:
            gap, limit = float(np.log(upper / lower)), float(np.sqrt(upper * lower))
        upper = lower
    limit = _down(limit)
    released = moved <= limit
    harmful = int((released & harms).sum())
    return ReleaseChoice(limit, int(released.sum()), harmful, release_bound(harmful, harmful_cases))


def _down(limit: float) -> float:
    """As a spelling can say it, and no case above it that was not."""
    return math.floor(limit * 1e6) / 1e6


def release_bound(released: int, harmful_cases: int) -> float:
    """The share of harmful cases that may be released in truth, where so many of them were."""
    return round(wilson_upper(released, harmful_cases), 4)


def roc(statistic: np.ndarray, harmful: np.ndarray) -> tuple[list[tuple[float, float]], float]:
    """Points (false-alarm share, caught share) as the limit falls, and the area under them."""
    order = np.argsort(-statistic, kind="stable")
    values, bad = statistic[order], harmful[order]
    last = np.append(values[1:] != values[:-1], True)  # ties are one point
    caught, alarms = np.cumsum(bad)[last] / max(bad.sum(), 1), np.cumsum(~bad)[last] / max((~bad).sum(), 1)
    points = [(0.0, 0.0), *zip(alarms.tolist(), caught.tolist(), strict=True)]
    area = float(np.trapezoid([y for _, y in points], [x for x, _ in points]))
    return points, area


def limit_at(statistics: np.ndarray, harmful: np.ndarray, false_alarms: float) -> LimitChoice:
    """The layer and limit of a canary at a stated false-alarm rate: per layer the lowest limit that at most this share
    of the harmless cases exceed; of the layers the one that catches most, then the one with the highest area under the
    ROC. Arguments and ValueError as ``choose_limit``."""
    if not harmful.any() or harmful.all():
        raise ValueError(f"{int(harmful.sum())} of {len(harmful)} cases are harmful: both kinds are needed")
    found = []
    for layer, values in enumerate(np.maximum(statistics, 1e-9)):
        good = np.sort(values[~harmful])[::-1]
        limit = round(float(good[min(int(np.floor(false_alarms * len(good) + 1e-9)), len(good) - 1)]) + 1e-6, 6)
        caught, alarms = (float((values[kind] > limit).mean()) for kind in (harmful, ~harmful))
        found.append((caught, roc(values, harmful)[1], LimitChoice(layer, limit, caught, alarms)))
    return max(found, key=lambda item: item[:2])[2]


def budget_plans(num_layers: int, budget: float) -> list[str]:
    """Spellings of plans that cost ``budget`` percent of a span's token-layers: ``none``; spent on the first quarter,
    half, three quarters, or all of the layers; and half and half on any two of these."""
    depths = sorted({max(1, round(num_layers * share)) for share in (0.25, 0.5, 0.75, 1.0)}, reverse=True)
    spent = [{depth: 1.0} for depth in depths]
    spent += [{a: 0.5, b: 0.5} for a, b in combinations(depths, 2)]
    plans = ["none"]
    for shares in spent:
        percents = [
            min(100.0, sum(budget * share * num_layers / depth for depth, share in shares.items() if layer < depth))
            for layer in range(num_layers)
        ]
        groups = ((value, len(list(group))) for value, group in groupby(percents))
        plans.append("percents:" + ",".join(f"{value:.6g}*{count}" for value, count in groups))
    return list(dict.fromkeys(plans))


def least_error(kl: Mapping[str, float], tolerance: float = 1e-3) -> str:
    """The plan with the least KL; the first named (list the cheap ones first) among those within ``tolerance`` nats."""
    least = min(kl.values())
    return next(plan for plan, value in kl.items() if value <= least + tolerance)
