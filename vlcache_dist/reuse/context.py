"""What a picture's context is, as far as reuse is concerned, and what is remembered of such contexts. Pure.

A picture's KV carries its *role*: which picture of the prompt it is, and what the words directly before it call it. The
signature of a context is a digest of these two. It rides in the last 8 of a variant's 16 bytes, so whoever holds a
recorded object, on any worker, knows the context it was recorded in without another message.
"""

from __future__ import annotations

import enum
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from blake3 import blake3

from vlcache_dist.hashing import frame
from vlcache_dist.reuse.evidence import wilson_upper
from vlcache_dist.types import MediaSpan, Variant

SIGNATURE_BYTES = 8
NEAR_TOKENS = 16  #: text tokens before a picture that count as its name
LONG_PREFIX = 128  #: text tokens before the first picture, from which on a prompt is of another format


def signature(token_ids: Sequence[int], spans: Sequence[MediaSpan], index: int) -> bytes:
    """Of span ``index`` (spans in order of position): 8 bytes."""
    span = spans[index]
    floor = spans[index - 1].end if index else 0
    near = token_ids[max(floor, span.start - NEAR_TOKENS) : span.start]
    fields = [("ordinal", index.to_bytes(4, "big")), ("near", b"".join(t.to_bytes(4, "big") for t in near))]
    return blake3(frame(fields)).digest(SIGNATURE_BYTES)


def variant_in(context: bytes) -> Variant:
    """A fresh name for a computation in a context."""
    return os.urandom(16 - SIGNATURE_BYTES) + context


def recorded_in(variant: Variant) -> bytes:
    """The signature of the context that an object was recorded in."""
    return variant[-SIGNATURE_BYTES:]


def prompt_format(spans: Sequence[MediaSpan]) -> str:
    """A coarse name for prompts of a kind, for the guard's books: how many pictures, and how much text before, between.

    ``1 picture``, ``2 pictures, long prefix``, ``3+ pictures, spread`` (more text between two than a label)."""
    count = str(len(spans)) if len(spans) < 3 else "3+"
    name = f"{count} picture{'' if count == '1' else 's'}"
    if spans[0].start >= LONG_PREFIX:
        name += ", long prefix"
    if any(b.start - a.end > 2 * NEAR_TOKENS for a, b in pairwise(spans)):
        name += ", spread"
    return name


class Advice(enum.StrEnum):
    WATCH = "watch"  #: reuse, under the canary
    COMPUTE = "compute"  #: the canary would call: do not even try
    TRUST = "trust"  #: the canary would call for nothing


HARMFUL_AFTER = 2  #: alarms in a row
HARMLESS_AT = 0.05  #: share of alarms that were right, at most (Wilson, one-sided 95 %): 52 wrong ones in a row
REFRESH = 16  #: one request in so many is watched whatever is remembered


@dataclass(slots=True)
class _Context:
    alarms: int = 0  # since the last calm one
    right: int = 0  # alarms of which the discarded first token was wrong
    judged: int = 0
    asked: int = 0


class ContextMemory:
    """Per tenant: what reuse of one context's KV in another one led to. ``tenants`` and ``contexts`` (of each) are the
    most that are kept; who was used longest ago is forgotten first."""

    def __init__(self, tenants: int = 256, contexts: int = 1024) -> None:
        self._limits = tenants, contexts
        self._tenants: OrderedDict[str, OrderedDict[bytes, _Context]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def advise(self, tenant: str, donor: bytes, here: bytes) -> Advice:
        """What to do with KV recorded in ``donor`` in the context ``here``. Counts: every ``REFRESH``-th time the
        canary is heard again, so that nothing is remembered for ever."""
        contexts = self._tenants.get(tenant)
        known = None if contexts is None else contexts.get(donor + here)
        if known is None:
            return Advice.WATCH
        verdict = Advice.WATCH
        if known.judged and wilson_upper(known.right, known.judged) <= HARMLESS_AT:
            verdict = Advice.TRUST
        elif known.alarms >= HARMFUL_AFTER:
            verdict = Advice.COMPUTE
        if verdict is not Advice.WATCH:
            known.asked += 1
            if known.asked % REFRESH == 0:
                return Advice.WATCH
        return verdict

    def observe(self, tenant: str, donor: bytes, here: bytes, *, alarmed: bool, was_right: bool | None = None) -> None:
        """A canary was heard. ``was_right``: whether the first token would have been wrong without the alarm."""
        known = self._context(tenant, donor + here)
        known.alarms = known.alarms + 1 if alarmed else 0
        if alarmed and was_right is not None:
            known.judged += 1
            known.right += was_right

    def _context(self, tenant: str, pair: bytes) -> _Context:
        contexts = self._tenants.setdefault(tenant, OrderedDict())
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > self._limits[0]:
            self._tenants.popitem(last=False)
        known = contexts.setdefault(pair, _Context())
        contexts.move_to_end(pair)
        if len(contexts) > self._limits[1]:
            contexts.popitem(last=False)
        return known
