"""How many leading vision tokens of a reused span are recomputed in each layer.

Spellings (percent figures are of the span's own length, rounded up to whole tokens):

``none``                     nothing is recomputed
``full``                     everything is: the answer equals ``reuse=off``
``uniform:5``                5 % in every layer
``uniform:2,min=16``         2 %, but at least 16 tokens
``pyramid:20-2``             20 % in the first layer, falling linearly to 2 % in the last; ``,min=16`` as above
``counts:80*4,40*8,16*16``   tokens per layer, first layer first; ``x*k`` stands for k layers
``percents:20*4,2.5*24``     percent per layer
``guarded``                  the default: probes, watched and verified; it becomes a spelling with a canary where the
                             number of layers is known (``reuse.guarded``)
``file:plan.json``           read where the file lies (``reuse.plan_file``); it becomes ``counts:`` or ``percents:``,
                             so that a spelling on the wire always carries the whole plan

Any of them may be followed by ``+canary:LEADING,STRIDED,LAYER<LIMIT,...`` (``reuse.canary``): probe tokens are
recomputed in every layer besides, and if they leave the cached ones, so is the span with all behind it.

Counts never grow with depth: a token is recomputed at a layer only if its hidden state was carried there.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import groupby

import numpy as np

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.probes import with_probes

MAX_SPELLING = 8192  #: characters; a plan is part of a request and is parsed before anything else is known about it
MAX_LAYERS = 1024
MAX_TOKENS = 10_000_000
FORMS = "guarded, none, full, uniform:PERCENT, pyramid:FIRST-LAST, counts:..., percents:..., file:PATH"

_PERCENT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?")
_COUNT = re.compile(r"[0-9]{1,8}")


class Plan(ABC):
    """An immutable recompute plan. Equal plans have equal canonical spellings: ``str(plan)``."""

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(spelling: str) -> Plan:
        """The plan that a spelling names. Raises InvalidPlan, also for ``file:`` (use ``plan_file.resolve_plan``)."""
        if len(spelling) > MAX_SPELLING:
            raise InvalidPlan(f"plan of {len(spelling)} characters: at most {MAX_SPELLING} are read")
        plain, guarded, canary = spelling.partition("+canary:")
        if guarded:
            return Guarded(Plan.parse(plain), Canary.parse(canary))
        form, colon, rest = spelling.partition(":")
        if form in ("none", "full"):
            if colon:
                raise InvalidPlan(f"plan {spelling!r}: {form!r} takes no argument")
            return Ramp(Fraction(0), Fraction(0)) if form == "none" else Ramp(Fraction(100), Fraction(100))
        if form == "uniform":
            body, minimum = _split_minimum(rest, spelling)
            percent = _percent(body, spelling)
            return Ramp(percent, percent, minimum)
        if form == "pyramid":
            body, minimum = _split_minimum(rest, spelling)
            first, dash, last = body.partition("-")
            if not dash:
                raise InvalidPlan(f"plan {spelling!r}: expected pyramid:FIRST-LAST in percent, as in pyramid:20-2")
            return Ramp(_percent(first, spelling), _percent(last, spelling), minimum)
        if form == "counts":
            return LayerCounts(tuple(int(_count(x, spelling)) for x in _expand(rest, spelling)))
        if form == "percents":
            return LayerPercents(tuple(_percent(x, spelling) for x in _expand(rest, spelling)))
        if form == "guarded":
            raise InvalidPlan(f"plan {spelling!r}: it takes no argument, and is spelled out before it travels")
        if form == "file":
            raise InvalidPlan(f"plan {spelling!r}: files are read where the server or library is configured, not here")
        raise InvalidPlan(f"plan {spelling!r}: unknown form {form!r}; known are {FORMS}")

    @abstractmethod
    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Tokens recomputed per layer of a span of ``num_tokens``: non-increasing, each in [0, num_tokens].

        Raises InvalidPlan if the plan lists another number of layers."""

    @abstractmethod
    def __str__(self) -> str: ...

    def depths(self, num_tokens: int, num_layers: int) -> np.ndarray:
        """int32 [num_tokens], read-only: in how many layers each token's K and V are recomputed, #{l : counts[l] > i}.
        Made once for the plans and sizes that are asked for again and again."""
        return _depths(self, num_tokens, num_layers)

    def _depths(self, num_tokens: int, num_layers: int) -> np.ndarray:
        ascending = np.array(self.counts(num_tokens, num_layers)[::-1], np.int64)
        below = np.searchsorted(ascending, np.arange(num_tokens), side="right")
        return (num_layers - below).astype(np.int32)

    @property
    def canary(self) -> Canary | None:
        """What watches over spans that are reused by this plan."""
        return None

    def is_full(self, num_tokens: int, num_layers: int) -> bool:
        """True if every token is recomputed in every layer: such a span is not approximated at all."""
        return self.counts(num_tokens, num_layers)[-1] >= num_tokens

    def is_none(self, num_tokens: int, num_layers: int) -> bool:
        """True if nothing of such a span is recomputed, so that its encoder output is not needed."""
        return self.counts(num_tokens, num_layers)[0] == 0


@dataclass(frozen=True, slots=True)
class Ramp(Plan):
    """Percent falling linearly from ``first`` (layer 0) to ``last``, never below ``minimum`` tokens."""

    first: Fraction
    last: Fraction
    minimum: int = 0

    def __post_init__(self) -> None:
        _check_percents((self.first, self.last))
        if not 0 <= self.minimum <= MAX_TOKENS:
            raise InvalidPlan(f"plan minimum {self.minimum}: must be 0 to {MAX_TOKENS} tokens")
        if self.first < self.last:
            raise InvalidPlan(
                f"pyramid from {_decimal(self.first)} to {_decimal(self.last)} percent: the last layer must not "
                "recompute more than the first"
            )

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        _check_shape(num_tokens, num_layers)
        if self.first == self.last:  # most plans, and every warm request asks: fractions are slow
            return (min(num_tokens, max(_ceil_percent(self.first, num_tokens), self.minimum)),) * num_layers
        steps = max(num_layers - 1, 1)
        percents = (self.first + (self.last - self.first) * layer / steps for layer in range(num_layers))
        return tuple(min(num_tokens, max(_ceil_percent(p, num_tokens), self.minimum)) for p in percents)

    def __str__(self) -> str:
        if self.last == 100:
            return "full"
        if self.first == 0 and self.minimum == 0:
            return "none"
        suffix = f",min={self.minimum}" if self.minimum else ""
        if self.first == self.last:
            return f"uniform:{_decimal(self.first)}{suffix}"
        return f"pyramid:{_decimal(self.first)}-{_decimal(self.last)}{suffix}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True, slots=True)
class LayerCounts(Plan):
    """Tokens per layer, whatever the span's length (capped at it)."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_layers(len(self.tokens))
        for layer, count in enumerate(self.tokens):
            if not 0 <= count <= MAX_TOKENS:
                raise InvalidPlan(f"plan layer {layer}: {count} tokens; must be 0 to {MAX_TOKENS}")
        _check_monotone(self.tokens, "tokens")

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        _check_shape(num_tokens, num_layers)
        _check_model_layers(len(self.tokens), num_layers)
        return tuple(min(count, num_tokens) for count in self.tokens)

    def __str__(self) -> str:
        return "counts:" + _compress([str(count) for count in self.tokens])


@dataclass(frozen=True, slots=True)
class LayerPercents(Plan):
    """Percent of the span per layer."""

    percents: tuple[Fraction, ...]

    def __post_init__(self) -> None:
        _check_layers(len(self.percents))
        _check_percents(self.percents)
        _check_monotone(self.percents, "percent")

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        _check_shape(num_tokens, num_layers)
        _check_model_layers(len(self.percents), num_layers)
        return tuple(_ceil_percent(percent, num_tokens) for percent in self.percents)

    def __str__(self) -> str:
        return "percents:" + _compress([_decimal(percent) for percent in self.percents])


@dataclass(frozen=True, slots=True)
class Guarded(Plan):
    """``base`` with probe tokens. ``counts`` are the base's; ``depths`` have the probes too."""

    base: Plan
    guard: Canary

    @property
    def canary(self) -> Canary:
        return self.guard

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        self.guard.check_layers(num_layers)
        return self.base.counts(num_tokens, num_layers)

    def _depths(self, num_tokens: int, num_layers: int) -> np.ndarray:
        self.guard.check_layers(num_layers)
        return with_probes(self.base.depths(num_tokens, num_layers), self.guard.probes(num_tokens), num_layers)

    def is_none(self, num_tokens: int, num_layers: int) -> bool:
        return False

    def __str__(self) -> str:
        return str(self.base) if str(self.base) == "full" else f"{self.base}+{self.guard}"


@lru_cache(maxsize=64)
def _depths(plan: Plan, num_tokens: int, num_layers: int) -> np.ndarray:
    depths = plan._depths(num_tokens, num_layers)
    depths.setflags(write=False)
    return depths


def _split_minimum(rest: str, spelling: str) -> tuple[str, int]:
    body, comma, option = rest.partition(",")
    if not comma:
        return body, 0
    name, equals, value = option.partition("=")
    if name != "min" or not equals:
        raise InvalidPlan(f"plan {spelling!r}: unknown option {option!r}; the only one is min=TOKENS")
    return body, int(_count(value, spelling))


def _percent(text: str, spelling: str) -> Fraction:
    if not _PERCENT.fullmatch(text):
        raise InvalidPlan(f"plan {spelling!r}: {text!r} is not a percentage (0 to 100, at most 6 decimals)")
    return Fraction(text)


def _count(text: str, spelling: str) -> str:
    if not _COUNT.fullmatch(text):
        raise InvalidPlan(f"plan {spelling!r}: {text!r} is not a number of tokens")
    return text


def _expand(rest: str, spelling: str) -> list[str]:
    values: list[str] = []
    for item in rest.split(","):
        value, star, repeat = item.partition("*")
        times = int(_count(repeat, spelling)) if star else 1
        if times == 0 or len(values) + times > MAX_LAYERS:
            raise InvalidPlan(f"plan {spelling!r}: {item!r} is not 1 to {MAX_LAYERS} layers")
        values += [value] * times
    return values


def _compress(values: Sequence[str]) -> str:
    runs = ((value, len(list(group))) for value, group in groupby(values))
    return ",".join(f"{value}*{length}" if length > 1 else value for value, length in runs)


def _decimal(value: Fraction) -> str:
    """A percentage without exponent or trailing zeros; exact, since spellings have at most six decimals."""
    text = format(Decimal(value.numerator) / Decimal(value.denominator), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _ceil_percent(percent: Fraction, num_tokens: int) -> int:
    return -(-percent.numerator * num_tokens // (percent.denominator * 100))


def _check_shape(num_tokens: int, num_layers: int) -> None:
    if num_tokens < 1 or num_layers < 1:
        raise ValueError(f"a span of {num_tokens} tokens in {num_layers} layers")


def _check_layers(num_layers: int) -> None:
    if not 1 <= num_layers <= MAX_LAYERS:
        raise InvalidPlan(f"plan lists {num_layers} layers; must be 1 to {MAX_LAYERS}")


def _check_model_layers(listed: int, num_layers: int) -> None:
    if listed != num_layers:
        raise InvalidPlan(f"plan lists {listed} layers, the model has {num_layers}")


def _check_percents(percents: Sequence[Fraction]) -> None:
    for percent in percents:
        if not 0 <= percent <= 100:
            raise InvalidPlan(f"plan percentage {_decimal(percent)}: must be 0 to 100")


def _check_monotone(values: Sequence[int] | Sequence[Fraction], unit: str) -> None:
    for layer in range(1, len(values)):
        if values[layer] > values[layer - 1]:
            raise InvalidPlan(
                f"plan layer {layer} recomputes {_decimal(Fraction(values[layer]))} {unit}, more than layer "
                f"{layer - 1} with {_decimal(Fraction(values[layer - 1]))}: counts must not grow with depth"
            )
