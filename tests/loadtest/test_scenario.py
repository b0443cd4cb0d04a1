from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from vlcache_dist.errors import ConfigError
from vlcache_dist.loadtest.scenario import SCENARIOS, Planned, Scenario, plan, share_of, zipf_index


def slots(requests: list[Planned]) -> list[tuple[int, object, bool]]:
    """(tenant, picture, repeated) of every image slot, in the order of sending."""
    return [(r.tenant, p, again) for r in requests for p, again in zip(r.images, r.repeated, strict=True)]


@pytest.mark.parametrize("name", list(SCENARIOS))
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.95])
def test_a_slot_is_repeated_exactly_if_its_tenant_has_seen_the_picture(name: str, share: float) -> None:
    requests = plan(SCENARIOS[name], share, 120, seed=3)
    seen: set[tuple[int, object]] = set()
    for tenant, picture, repeated in slots(requests):
        assert ((tenant, picture) in seen) == repeated
        seen.add((tenant, picture))
    assert share_of(requests) == pytest.approx(share, abs=0.06)


def test_tenants_share_no_pictures_and_seeds_neither() -> None:
    by_tenant: dict[int, set[object]] = {}
    for tenant, picture, _ in slots(plan(SCENARIOS["tenants"], 0.75, 100, seed=3)):
        by_tenant.setdefault(tenant, set()).add(picture)
    assert len(by_tenant) == 4
    assert sum(map(len, by_tenant.values())) == len(set().union(*by_tenant.values()))
    mine = {picture for _, picture, _ in slots(plan(SCENARIOS["multi-image"], 0.5, 100, seed=3))}
    others = {picture for _, picture, _ in slots(plan(SCENARIOS["multi-image"], 0.5, 100, seed=4))}
    assert not mine & others


def test_zipf_shares() -> None:
    rng = random.Random(0)
    drawn = Counter(zipf_index(rng, 10, 1.0) for _ in range(20_000))
    harmonic = sum(1 / (i + 1) for i in range(10))
    for i in range(10):
        assert drawn[i] / 20_000 == pytest.approx(1 / (i + 1) / harmonic, abs=0.01)
    flat = Counter(zipf_index(rng, 10, 0.0) for _ in range(20_000))
    assert max(flat.values()) / min(flat.values()) < 1.2


def test_popularity_follows_the_exponent() -> None:
    def most_shown(zipf: float) -> int:
        requests = plan(Scenario("s", zipf=zipf), 0.9, 400, seed=1)
        return Counter(picture for _, picture, _ in slots(requests)).most_common(1)[0][1]

    assert most_shown(2.0) > 2 * most_shown(0.0)


def test_context_change_decides_whether_the_text_in_front_differs() -> None:
    def preambles(change: float) -> list[int]:
        return [request.preamble for request in plan(Scenario("s", context_change=change), 0.5, 100, seed=1)]

    assert set(preambles(0.0)) == {0}
    assert 0 not in preambles(1.0) and len(set(preambles(1.0))) == 100
    assert sum(number != 0 for number in preambles(0.3)) == pytest.approx(30, abs=1)


def test_a_window_slides() -> None:
    requests = plan(Scenario("s", "window", images=4, sessions=1), 0.75, 30, seed=1)
    for before, after in itertools.pairwise(requests[2:]):
        kept = sum(after.repeated)
        assert after.images[:kept] == before.images[4 - kept :]
    assert all(len(set(request.images)) == 4 for request in requests)


def test_a_conversation_repeats_its_whole_history() -> None:
    requests = plan(SCENARIOS["chat"], 0.8, 60, seed=1)
    longest = max(len(request.turns) for request in requests)
    assert 2 < longest <= SCENARIOS["chat"].max_turns
    histories = {request.turns for request in requests}
    assert all(request.turns[:-1] in histories for request in requests if len(request.turns) > 1)


def test_pictures_of_one_request_differ() -> None:
    for request in plan(SCENARIOS["multi-image"], 0.9, 100, seed=1):
        assert len(set(request.images)) == 3


@pytest.mark.parametrize(
    ("scenario", "share", "count", "word"),
    [
        (Scenario("s"), 1.0, 10, "share"),
        (Scenario("s"), -0.1, 10, "share"),
        (Scenario("s"), 0.5, 0, "requests"),
        (Scenario("s", sizes=((6, 8),)), 0.5, 10, "multiples of 4"),
    ],
)
def test_impossible_plans_are_refused(scenario: Scenario, share: float, count: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        plan(scenario, share, count, seed=1)
