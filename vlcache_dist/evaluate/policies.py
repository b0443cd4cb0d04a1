"""What may be recomputed of a reused picture, behind one interface: this project's plans and what others have proposed.

============== ====================================================================================================
spelling       what is fresh; source
============== ====================================================================================================
``full``       everything: the reference
``none``       nothing; K is rotated to its new position (position-independent reuse)
``unrotated``  nothing, and K stays at the position it was recorded at: verbatim reuse, to show why rotation is needed
``uniform:P``  the first P % of every picture in every layer (VLCache, arXiv 2512.12977, without its layer profile)
``pyramid:A-B``, ``counts:...``, ``percents:...``  as in ``reuse.plan`` (VLCache's layer-wise profile; calibrated plans)
``random:P``   P % drawn at random: the control
``last:P``     the last P %: the control
``blend:P``    P % with the largest deviation of K and V at layer 1, chosen per request (CacheBlend, arXiv 2405.16444).
               Layers 0 and 1 compute every token to find them, which is counted
``epic:P``     the first tokens of every chunk (EPIC, arXiv 2410.15332); a chunk is a row of the picture, as a chunk
               that is the whole picture would be ``uniform``
``mpic:K``     the first K tokens of every picture whatever its size (after MPIC, arXiv 2502.01960)
``shift:K``      K strided tokens are fresh in every layer, and what their K and V gained on average over the cached
               ones is added to all others of the picture (this project's: a change of role moves all tokens alike)
``attend:P@L``   P % of all reused vision tokens: those to which the prompt's last token pays the most attention in
                 layer L of a first pass in which all is reused; a second pass computes them (this project's: which
                 tokens must be right depends on the question). ``+shift:K`` behind it: both passes shift as well
``layer:N``      K and V of layer N alone, of all tokens: not a plan (their hidden states cost all layers below, which
                 is counted), but it shows where a model is sensitive
``band:I/N``     part I (from 0) of N equal parts, in all layers: which tokens matter
``inverse:A-B``  few tokens in low layers, more in high ones; all hidden states are computed, which is counted (a
               cache of hidden states would save that)
``resume:B``     all tokens in layers B and above, from the hidden states that they had before layer B where they were
                 recorded; K and V of the layers below stay (escalation from a cached layer boundary)
``X+canary:..``  plan X with probe tokens; a picture whose probes deviate, and all behind it, is computed in full
============== ====================================================================================================

Those of other systems are re-implementations of the selection rule alone, on this project's rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.reuse.probes import probe_tokens


@dataclass(frozen=True, slots=True)
class SpanView:
    """A reused picture as a policy sees it. ``columns``: tokens per row of the picture. ``deviation`` fp32 [layer, n]:
    norm of fresh minus cached K and V of a full run; what a policy may know of it is its own affair."""

    num_tokens: int
    num_layers: int
    columns: int
    deviation: np.ndarray
    rng: np.random.Generator


@dataclass(frozen=True, slots=True)
class Choice:
    """``fresh`` bool [layer, n]: K and V of these are recomputed. ``computed``: token-layers it takes."""

    fresh: np.ndarray
    computed: int


@dataclass(frozen=True, slots=True)
class Attend:
    """``percent`` of a case's reused vision tokens are chosen by the attention paid to them in ``layer``."""

    percent: float
    layer: int


@dataclass(frozen=True, slots=True)
class Policy:
    """``choose`` is called once per reused picture of a case; tokens of ``attend`` come on top."""

    name: str
    choose: Callable[[SpanView], Choice]
    rotated: bool = True
    shifted: bool = False
    canary: Canary | None = None
    attend: Attend | None = None
    resume: int | None = None


def parse_policy(spelling: str) -> Policy:
    """The policy of a spelling. Raises InvalidPlan."""
    form, _, rest = spelling.partition(":")
    if spelling == "unrotated":
        return Policy(spelling, _tokens(lambda view: np.arange(0)), rotated=False)
    if form in _SELECTIONS and "+" not in spelling:
        amount = _number(rest, spelling)
        select = _SELECTIONS[form]
        extra = 2 if form == "blend" else 0
        return Policy(spelling, _tokens(lambda view: select(view, amount), whole_layers=extra))
    if form == "shift":
        count = int(_number(rest, spelling))
        return Policy(spelling, _tokens(lambda view: probe_tokens(view.num_tokens, 0, count)), shifted=True)
    if form == "layer":
        return Policy(spelling, _one_layer(int(_number(rest, spelling)), spelling))
    if form == "resume":
        boundary = int(_number(rest, spelling))
        return Policy(spelling, _from_layer(boundary, spelling), resume=boundary)
    if form == "band":
        return Policy(spelling, _band(rest, spelling))
    if form == "attend":
        return _attending(spelling, rest)
    if form == "inverse":
        low, dash, high = rest.partition("-")
        if not dash:
            raise InvalidPlan(f"policy {spelling!r}: expected inverse:FIRST-LAST in percent")
        return Policy(spelling, _inverse(_number(low, spelling), _number(high, spelling)))
    plan = Plan.parse(spelling)
    return Policy(spelling, _by_plan(plan), canary=plan.canary)


def _attending(spelling: str, rest: str) -> Policy:
    chosen, plus, first = rest.partition("+")
    percent, at, layer = chosen.partition("@")
    if not at or (plus and not first.startswith("shift:")):
        raise InvalidPlan(f"policy {spelling!r}: expected attend:PERCENT@LAYER or attend:PERCENT@LAYER+shift:COUNT")
    attend = Attend(_number(percent, spelling), int(_number(layer, spelling)))
    if plus:
        return replace(parse_policy(first), name=spelling, attend=attend)
    return Policy(spelling, _tokens(lambda view: np.arange(0)), attend=attend)


def _one_layer(layer: int, spelling: str) -> Callable[[SpanView], Choice]:
    def choose(view: SpanView) -> Choice:
        if layer >= view.num_layers:
            raise InvalidPlan(f"policy {spelling!r}: the model has {view.num_layers} layers")
        fresh = np.zeros((view.num_layers, view.num_tokens), bool)
        fresh[layer] = True
        return Choice(fresh, view.num_tokens * (layer + 1))

    return choose


def _from_layer(boundary: int, spelling: str) -> Callable[[SpanView], Choice]:
    def choose(view: SpanView) -> Choice:
        if boundary >= view.num_layers:
            raise InvalidPlan(f"policy {spelling!r}: the model has {view.num_layers} layers")
        fresh = np.zeros((view.num_layers, view.num_tokens), bool)
        fresh[boundary:] = True
        return Choice(fresh, int(fresh.sum()))

    return choose


def _band(text: str, spelling: str) -> Callable[[SpanView], Choice]:
    number, slash, count = text.partition("/")
    if not slash or int(_number(number, spelling)) >= int(_number(count, spelling)):
        raise InvalidPlan(f"policy {spelling!r}: expected band:PART/PARTS, parts counted from 0")
    part, parts = int(_number(number, spelling)), int(_number(count, spelling))
    return _tokens(lambda view: np.arange(part * view.num_tokens // parts, (part + 1) * view.num_tokens // parts))


def _number(text: str, spelling: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidPlan(f"policy {spelling!r}: {text!r} is not a number") from None
    if not 0 <= value < math.inf:
        raise InvalidPlan(f"policy {spelling!r}: {text} is out of range")
    return value


def _share(view: SpanView, percent: float) -> int:
    return min(view.num_tokens, math.ceil(view.num_tokens * percent / 100 - 1e-9))


def _tokens(select: Callable[[SpanView], np.ndarray], whole_layers: int = 0) -> Callable[[SpanView], Choice]:
    """The same tokens in all layers; ``whole_layers`` compute every token to find them."""

    def choose(view: SpanView) -> Choice:
        chosen = np.zeros(view.num_tokens, bool)
        chosen[select(view)] = True
        fresh = np.repeat(chosen[None], view.num_layers, 0)
        fresh[:whole_layers] = True
        return Choice(fresh, int(fresh.sum()))

    return choose


def _blend(view: SpanView, percent: float) -> np.ndarray:
    return np.argsort(-view.deviation[min(1, view.num_layers - 1)], kind="stable")[: _share(view, percent)]


def _epic(view: SpanView, percent: float) -> np.ndarray:
    """Spread over the chunks: the first tokens of as many rows as the budget allows, evenly."""
    starts = np.arange(0, view.num_tokens, view.columns)
    count = _share(view, percent)
    if count <= len(starts):
        return starts[np.arange(count) * len(starts) // max(count, 1)]
    order = np.argsort(np.arange(view.num_tokens) % view.columns, kind="stable")
    return order[:count]


_SELECTIONS: dict[str, Callable[[SpanView, float], np.ndarray]] = {
    "random": lambda view, percent: view.rng.choice(view.num_tokens, _share(view, percent), replace=False),
    "last": lambda view, percent: np.arange(view.num_tokens - _share(view, percent), view.num_tokens),
    "blend": _blend,
    "epic": _epic,
    "mpic": lambda view, count: np.arange(min(int(count), view.num_tokens)),
}


def _inverse(first: float, last: float) -> Callable[[SpanView], Choice]:
    def choose(view: SpanView) -> Choice:
        steps = max(view.num_layers - 1, 1)
        counts = [_share(view, first + (last - first) * n / steps) for n in range(view.num_layers)]
        fresh = np.arange(view.num_tokens)[None] < np.array(counts)[:, None]
        needed = np.logical_or.accumulate(fresh[::-1])[::-1]  # a hidden state at layer l needs all layers below
        return Choice(fresh, int(needed.sum()))

    return choose


def _by_plan(plan: Plan) -> Callable[[SpanView], Choice]:
    def choose(view: SpanView) -> Choice:
        depths = plan.depths(view.num_tokens, view.num_layers)
        return Choice(np.arange(view.num_layers)[:, None] < depths[None], int(depths.sum()))

    return choose
