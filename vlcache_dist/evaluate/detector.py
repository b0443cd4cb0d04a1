"""How well a few probe tokens tell harmful from harmless reuse: limits drawn on one suite, tried on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlcache_dist.evaluate.report import HARMFUL_KL, Outcome
from vlcache_dist.evaluate.study import Sighting, statistics
from vlcache_dist.reuse.calibrate import choose_limit, roc, split
from vlcache_dist.reuse.evidence import wilson_upper

Probes = tuple[int, int]
_POINTS = 60  #: of a curve, at most


def figures(tuned: Mapping[Probes, Sequence[Sighting]], tried: Mapping[Probes, Sequence[Sighting]]) -> dict[str, Any]:
    """Per probe set (leading, strided) the canary chosen on ``tuned`` and what it catches in ``tried``; of the last set
    also ROC curves by layer, and per format how far probes deviate. Raises ValueError where ``tuned`` holds harmful
    or harmless cases alone."""
    sets = [_one(probes, tuned[probes], tried[probes]) for probes in tuned]
    last = list(tuned)[-1]
    values, harmful = statistics(tried[last])
    return {
        "cases_tune": len(tuned[last]),
        "cases_held_out": len(tried[last]),
        "harmful_kl": HARMFUL_KL,
        "probe_sets": sets,
        "roc": {"leading": last[0], "strided": last[1], "by_layer": [_thinned(v, harmful) for v in values]},
        "formats": [*_formats("tune", tuned[last]), *_formats("held-out", tried[last])],
    }


def _one(probes: Probes, tuned: Sequence[Sighting], tried: Sequence[Sighting]) -> dict[str, Any]:
    values, harmful = statistics(tuned)
    choice = choose_limit(values, harmful)
    other, harmed = statistics(tried)
    alarms = other[choice.layer] > choice.limit
    calm = {s.format for s in tried} - {s.format for s in tried if s.harmful}
    in_calm = np.array([s.format in calm for s in tried])
    return {
        "leading": probes[0],
        "strided": probes[1],
        "layer": choice.layer,
        "limit": choice.limit,
        "tune_caught": _share(choice.caught),
        "tune_false_alarms": _share(choice.false_alarms),
        "held_out_harmful": int(harmed.sum()),
        "held_out_caught": _share(alarms[harmed].mean()),
        "held_out_false_alarms": _share(alarms[~harmed].mean()),
        "held_out_cases_in_harmless_formats": int(in_calm.sum()),
        "held_out_false_alarms_in_harmless_formats": _share(alarms[in_calm].mean()),
        "auc_by_layer_V_max": [_share(roc(layer, harmed)[1]) for layer in other],
        "norms": [_norm(tried, of_keys, averaged) for of_keys in (True, False) for averaged in (False, True)],
        "auc_entropy": _share(roc(np.array([s.entropy for s in tried]), harmed)[1]),
    }


def _norm(tried: Sequence[Sighting], of_keys: bool, averaged: bool) -> dict[str, Any]:
    """Of another statistic by layer: the area under its ROC, and how many harmful cases its split would miss."""
    values, harmful = statistics(tried, of_keys=of_keys, averaged=averaged)
    missed = [int((layer[harmful] <= split(np.maximum(layer, 1e-9))[0]).sum()) for layer in values]
    return {
        "of": "K" if of_keys else "V",
        "over_probes": "mean" if averaged else "max",
        "auc_by_layer": [_share(roc(layer, harmful)[1]) for layer in values],
        "missed_by_split": missed,
    }


def verdicts(unwatched: Sequence[Outcome], released: Sequence[Outcome]) -> dict[str, Any]:
    """What a plan that judges its own passes, ``released``, makes of cases that reuse alone, ``unwatched`` (the same
    cases in the same order), would harm or not. Caught: harm that is not in the released answer, since everything was
    computed or a second pass repaired it. A false alarm: everything computed in a case that was harmless."""
    harmful = np.array([o.harmful for o in unwatched])
    bad, alarmed, escalated = (np.array([getattr(o, what) for o in released]) for what in _VERDICT)
    passed, harmless = int((bad & harmful).sum()), ~harmful
    return {
        "cases": len(harmful),
        "harmful": int(harmful.sum()),
        "alarmed_harmful": int((alarmed & harmful).sum()),
        "repaired": int((harmful & ~escalated & ~bad).sum()),
        "released_harmful": passed,
        "caught": _share(1 - passed / max(harmful.sum(), 1)),
        "missed_at_most": _share(wilson_upper(passed, int(harmful.sum()))),
        "harmed_by_the_plan": int((bad & harmless).sum()),
        "alarms_in_harmless": _share(alarmed[harmless].mean()),
        "false_alarms": _share(escalated[harmless].mean()),
    }


_VERDICT = ("harmful", "alarmed", "escalated")


def _formats(suite: str, sightings: Sequence[Sighting]) -> list[dict[str, Any]]:
    values, harmful = statistics(sightings)
    names = np.array([s.format for s in sightings])
    out = []
    for name in dict.fromkeys(names.tolist()):
        here = names == name
        out.append(
            {
                "format": name,
                "suite": suite,
                "cases": int(here.sum()),
                "harmful": int(harmful[here].sum()),
                **{
                    f"v_{what}_by_layer": [_share(x) for x in pick(values[:, here], axis=1)]
                    for what, pick in (("median", np.median), ("min", np.min), ("max", np.max))
                },
            }
        )
    return out


def _thinned(statistic: np.ndarray, harmful: np.ndarray) -> list[list[float]]:
    points = roc(statistic, harmful)[0]
    picked = np.unique(np.linspace(0, len(points) - 1, _POINTS).round().astype(int))
    return [[_share(x) for x in points[i]] for i in picked]


def _share(value: float) -> float:
    return round(float(value), 4)
