"""Plan files: explicit counts or percents per layer, as calibration writes them. The only I/O of ``reuse``.

::

    {"format": 1, "model": "<weights fingerprint>", "num_layers": 28,
     "counts": [82, 82, 40, ...],            either tokens per layer
     "percents": [20, 20, 2.5, ...],         or percent of the span per layer (at most six decimals are kept)
     "canary": "1,2,5<0.31,again:5@8<0.02",  optional: probes, limits, and a second pass (``reuse.canary``)
     "provenance": {...}}                    optional: data and results of the calibration, not interpreted
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.guarded import spelled_out
from vlcache_dist.reuse.plan import Guarded, LayerCounts, LayerPercents, Plan

FORMAT = 1


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The file's contents; exactly one of ``counts`` and ``percents`` is given."""

    model: str
    num_layers: int
    format: int
    counts: tuple[int, ...] | None = None
    percents: tuple[float, ...] | None = None
    canary: str | None = None
    provenance: dict[str, Any] | None = None


def resolve_plan(spelling: str, *, model: str, num_layers: int) -> Plan:
    """``Plan.parse``, ``guarded`` spelled out (``reuse.guarded``), and ``file:PATH`` read from this machine's disk; for
    operators' and library users' spellings.

    Raises InvalidPlan for a malformed spelling, an unreadable file, one made for another model (``model`` is the
    weights fingerprint), or a plan whose layers do not fit the model.
    """
    if spelling.startswith("file:"):
        path = spelling.removeprefix("file:")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InvalidPlan(f"plan file {path!r}: {error.strerror or error}") from error
        return parse_plan_file(data, model=model, num_layers=num_layers, name=path)
    return Plan.parse(spelled_out(spelling, num_layers))


def parse_plan_file(data: bytes, *, model: str, num_layers: int, name: str) -> Plan:
    """The plan in a file's bytes; ``name`` is for messages. Raises InvalidPlan."""
    try:
        file = msgspec.json.decode(data, type=PlanFile)
    except msgspec.MsgspecError as error:
        raise InvalidPlan(f"plan file {name!r}: {error}") from error
    if file.format != FORMAT:
        raise InvalidPlan(f"plan file {name!r}: format {file.format}, this version reads {FORMAT}")
    if file.model != model:
        raise InvalidPlan(f"plan file {name!r} was made for model {file.model!r}, this is {model!r}")
    if file.num_layers != num_layers:
        raise InvalidPlan(f"plan file {name!r} says {file.num_layers} layers, the model has {num_layers}")
    try:
        plan = _plan(file)
        if file.canary is not None:
            plan = Guarded(plan, Canary.parse(file.canary))
        plan.counts(1, num_layers)
    except InvalidPlan as error:
        raise InvalidPlan(f"plan file {name!r}: {error}") from error
    return plan


def _plan(file: PlanFile) -> Plan:
    if file.counts is not None and file.percents is None:
        return LayerCounts(file.counts)
    if file.percents is not None and file.counts is None:
        return LayerPercents(tuple(Fraction(f"{percent:.6f}") for percent in file.percents))
    raise InvalidPlan("give either counts or percents")
