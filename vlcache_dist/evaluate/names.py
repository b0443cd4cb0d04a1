"""Policies by the names that people ask for: what each stands for in a model, and rows of figures under these names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.evaluate.policies import parse_policy
from vlcache_dist.reuse.guarded import GUARDED, spelled_out
from vlcache_dist.reuse.plan_file import resolve_plan

ALWAYS = 1000  #: nats: a second pass with this limit is always released


def spell_out(names: Sequence[str], *, model: str, num_layers: int, plan: Path | None = None) -> dict[str, str]:
    """By name the spelling that ``policies.parse_policy`` reads. ``guarded``: the default plan; ``guarded once``: with
    one pass behind an alarm; ``canary``: with none; ``calibrated``: the plan file ``plan``; ``off``: ``full``;
    ``pyramid``: 10 % falling to 0; ``file:PATH``; anything else stands for itself. ``model`` is the weights
    fingerprint. Raises InvalidPlan."""
    guarded = spelled_out(GUARDED, num_layers)
    known = {
        "off": "full",
        "pyramid": "pyramid:10-0",
        GUARDED: guarded,
        "guarded once": guarded.replace("x2,", ","),
        "canary": guarded.partition(",again:")[0],
    }
    found = {}
    for name in names:
        spelling = known.get(name, name)
        if name == "calibrated":
            if plan is None:
                raise InvalidPlan("policy 'calibrated': name the plan file that `calibrate` wrote (--plan plan.json)")
            spelling = f"file:{plan}"
        if spelling.startswith("file:"):
            spelling = str(resolve_plan(spelling, model=model, num_layers=num_layers))
        parse_policy(spelling)
        found[name] = spelling
    return found


def second_pass(percent: float, layer: int, limit: float = ALWAYS) -> str:
    """The plan that computes one probe and, in a second pass over KV that follows it, the ``percent`` of the vision
    tokens that are attended to most in ``layer``: in any context, and released if the first token moves by no more
    than ``limit``."""
    return f"none+canary:0,1,0<0,again:{percent:g}@{layer}<{limit:g}"


def under_names(rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of figures of spellings as rows of ``names`` (name -> spelling), format by format."""
    by_spelling = {(row["format"], row["policy"]): row for row in rows}
    formats = dict.fromkeys(format_ for format_, _ in by_spelling)
    return [
        {**by_spelling[format_, spelling], "policy": name} for format_ in formats for name, spelling in names.items()
    ]
