"""Signatures of contexts, what is remembered of them, and drift between two first tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlcache_dist.reuse.context import (
    HARMFUL_AFTER,
    REFRESH,
    Advice,
    ContextMemory,
    prompt_format,
    recorded_in,
    signature,
    variant_in,
)
from vlcache_dist.reuse.drift import first_token_drift
from vlcache_dist.types import MediaSpan, TokenLogprobs

A, B = b"a" * 8, b"b" * 8


def spans(*places: tuple[int, int]) -> tuple[MediaSpan, ...]:
    return tuple(MediaSpan(bytes([i]) * 32, s, n, (1, 2, 2 * n), index=i) for i, (s, n) in enumerate(places))


def test_signatures_tell_roles_apart_and_pictures_not() -> None:
    tokens = list(range(100))
    two = spans((10, 8), (25, 8))
    assert signature(tokens, two, 0) != signature(tokens, two, 1)
    moved = signature([7] * 40 + tokens, spans((50, 8), (65, 8)), 1)
    assert moved == signature(tokens, two, 1), "what stands far before a picture is not its name"
    renamed = [*tokens[:20], 999, *tokens[21:]]
    assert signature(renamed, two, 1) != signature(tokens, two, 1)
    other = signature(tokens, spans((10, 8), (25, 4)), 1)
    assert other == signature(tokens, two, 1), "the picture itself does not count"
    variant = variant_in(A)
    assert len(variant) == 16 and recorded_in(variant) == A and variant != variant_in(A)


@pytest.mark.parametrize(
    ("places", "name"),
    [
        (((10, 8),), "1 picture"),
        (((200, 8),), "1 picture, long prefix"),
        (((10, 8), (25, 8)), "2 pictures"),
        (((10, 8), (25, 8), (100, 8), (115, 8)), "3+ pictures, spread"),
    ],
)
def test_formats(places: tuple[tuple[int, int], ...], name: str) -> None:
    assert prompt_format(spans(*places)) == name


def test_harm_is_remembered_until_a_calm_sighting() -> None:
    memory = ContextMemory()
    for _ in range(HARMFUL_AFTER):
        assert memory.advise("t", A, B) is Advice.WATCH
        memory.observe("t", A, B, alarmed=True, was_right=True)
    assert memory.advise("t", A, B) is Advice.COMPUTE
    assert memory.advise("t", B, A) is Advice.WATCH and memory.advise("u", A, B) is Advice.WATCH
    memory.observe("t", A, B, alarmed=False)
    assert memory.advise("t", A, B) is Advice.WATCH


def test_nothing_is_remembered_for_ever() -> None:
    memory = ContextMemory()
    for _ in range(HARMFUL_AFTER):
        memory.observe("t", A, B, alarmed=True, was_right=True)
    heard = [memory.advise("t", A, B) for _ in range(3 * REFRESH)]
    assert heard.count(Advice.WATCH) == 3 and heard.count(Advice.COMPUTE) == 3 * (REFRESH - 1)


def test_alarms_for_nothing_are_trusted_only_after_many_and_never_after_one_right_one() -> None:
    memory = ContextMemory()
    wrong = 0
    while memory.advise("t", A, B) is not Advice.TRUST:
        memory.observe("t", A, B, alarmed=True, was_right=False)
        wrong += 1
        assert wrong < 100
    assert wrong >= 50
    memory.observe("t", A, B, alarmed=True, was_right=True)
    assert Advice.TRUST not in [memory.advise("t", A, B) for _ in range(4)]


def test_memory_is_bounded_per_tenant_and_in_tenants() -> None:
    memory = ContextMemory(tenants=3, contexts=5)
    for tenant in range(10):
        for number in range(20):
            memory.observe(str(tenant), A, bytes([number]) * 8, alarmed=True)
    assert len(memory) == 15
    memory.observe("9", A, bytes([19]) * 8, alarmed=True)
    assert memory.advise("9", A, bytes([19]) * 8) is Advice.COMPUTE


def test_drift_is_a_lower_bound_that_is_tight_where_the_alternatives_hold_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, q = (np.log(rng.dirichlet(np.full(40, 0.1)) + 1e-12) for _ in range(2))
        true = float((np.exp(p) * (p - q)).sum())
        full, other = (
            TokenLogprobs(0, 0.0, tuple((int(i), float(x[i])) for i in np.argsort(-x)[:n]))
            for x, n in ((p, 20), (q, 20))
        )
        kl, agrees = first_token_drift(full, other)
        assert 0 <= kl <= true + 1e-6
        assert agrees == (p.argmax() == q.argmax())
    same = TokenLogprobs(1, 0.0, ((1, math.log(0.9)), (2, math.log(0.1))))
    flipped = TokenLogprobs(2, 0.0, ((2, math.log(0.9)), (1, math.log(0.1))))
    assert first_token_drift(same, same) == (0.0, True)
    kl, agrees = first_token_drift(same, flipped)
    assert not agrees and kl == pytest.approx(0.8 * math.log(9), rel=1e-6)
