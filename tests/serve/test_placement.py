"""Placement: the least expected time to first token, load first, affinity second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_dist.errors import BadRequest, WorkerLost
from vlcache_dist.serve.placement import (
    POLICIES,
    Candidate,
    Costs,
    Demand,
    SpanDemand,
    Turns,
    active_tokens,
    affinity,
    choose,
    expected_ttft,
)

COSTS = Costs(pass_s=0.0, token_s=1e-4, encode_token_s=1e-4, fetch_byte_s=1e-9, fetch_base_s=1e-3)
KEY = b"k" * 32


def span(holders: set[str], tokens: int = 1000, key: bytes = KEY, recompute: int = 20) -> SpanDemand:
    return SpanDemand(key, tokens, kv_bytes=tokens * 1000, recompute=recompute, holders=frozenset(holders))


def workers(*queued: int, **more: object) -> list[Candidate]:
    return [Candidate(f"p{i}#x", f"p{i}", queued_tokens=tokens, **more) for i, tokens in enumerate(queued)]  # type: ignore[arg-type]


def test_an_idle_holder_wins() -> None:
    choice = choose(workers(0, 0), Demand(50, (span({"p1#x"}),), reuse=True), COSTS)
    assert choice.worker_id == "p1#x"
    assert choice.active_tokens == 70
    assert choice.expected_s == pytest.approx(70 * 1e-4)


def test_a_busy_holder_loses_to_a_fetch_and_a_fetch_to_a_slow_link() -> None:
    demand = Demand(50, (span({"p1#x"}),), reuse=True)
    assert choose(workers(0, 5000), demand, COSTS).worker_id == "p0#x"
    slow = [
        Candidate("p0#x", "p0", read_bytes_per_s={"p1#x": 1e6}),
        Candidate("p1#x", "p1", queued_tokens=5000),
    ]
    assert choose(slow, demand, COSTS).worker_id == "p1#x"


def test_the_best_of_several_holders_is_read_and_an_unreadable_one_means_computing() -> None:
    speeds = {"p1#x": 1e6, "p2#x": 1e9, "p3#x": 0.0, "p4#x": 5e8}
    candidate = Candidate("p0#x", "p0", read_bytes_per_s=speeds)
    far = Candidate("p0#x", "p0", read_bytes_per_s=speeds, read_latency_s={"p2#x": 20e-3, "p4#x": 1e-4})
    near, _ = expected_ttft(far, Demand(0, (span({"p2#x", "p4#x"}),), reuse=True), COSTS)
    assert near == pytest.approx(1e-3 + 1e-4 + 1e6 / 5e8 + 20 * 1e-4), "the fastest for so few bytes is not the widest"
    both, _ = expected_ttft(candidate, Demand(0, (span({"p1#x", "p2#x"}),), reuse=True), COSTS)
    assert both == pytest.approx(1e-3 + 1e6 / 1e9 + 20 * 1e-4)
    none, why = expected_ttft(candidate, Demand(0, (span({"p3#x"}),), reuse=True), COSTS)
    assert none == pytest.approx(1000 * 2e-4 + 20 * 1e-4) and "fetch 200.0" in why


def test_without_reuse_holders_do_not_matter() -> None:
    demand = Demand(50, (span({"p1#x"}),), reuse=False)
    assert choose(workers(0, 10), demand, COSTS).worker_id == "p0#x"
    assert active_tokens(demand) == 1050


def test_the_same_image_twice_is_fetched_and_encoded_once() -> None:
    once, _ = expected_ttft(workers(0)[0], Demand(0, (span({"p9#x"}),), reuse=True), COSTS)
    twice, _ = expected_ttft(workers(0)[0], Demand(0, (span({"p9#x"}), span({"p9#x"})), reuse=True), COSTS)
    assert twice - once == pytest.approx(20 * 1e-4)
    fresh, _ = expected_ttft(workers(0)[0], Demand(0, (span(set()), span(set())), reuse=True), COSTS)
    assert fresh == pytest.approx(1000 * 2e-4 + 20 * 1e-4)


def test_equal_workers_take_turns() -> None:
    turns = Turns()
    chosen = []
    for _ in range(6):
        choice = choose(workers(0, 0, 0), Demand(10, (), reuse=True), COSTS, turns=turns)
        turns.taken(choice.worker_id)
        chosen.append(choice.worker_id)
    assert sorted(chosen[:3]) == sorted(chosen[3:]) == ["p0#x", "p1#x", "p2#x"]


def test_measured_speed_replaces_the_default() -> None:
    fast = Candidate("p0#x", "p0", queued_tokens=100, token_s=1e-6)
    slow = Candidate("p1#x", "p1", queued_tokens=10, token_s=1e-3)
    assert choose([slow, fast], Demand(50, (), reuse=True), COSTS).worker_id == "p0#x"


def test_many_small_requests_are_a_queue_too() -> None:
    """Warm requests have few tokens; what they cost is their passes."""
    many = Candidate("p0#x", "p0", queued=10, queued_tokens=100, pass_s=5e-3, token_s=1e-5)
    one = Candidate("p1#x", "p1", queued=1, queued_tokens=2000, pass_s=5e-3, token_s=1e-5)
    seconds, _ = expected_ttft(many, Demand(50, (), reuse=True), COSTS)
    assert seconds == pytest.approx(10 * 5e-3 + 100e-5 + 5e-3 + 50e-5)
    assert choose([many, one], Demand(50, (), reuse=True), COSTS).worker_id == "p1#x"


def test_fetching_goes_on_while_the_queue_is_worked_off() -> None:
    far = Demand(0, (span({"p9#x"}),), reuse=True)
    idle, _ = expected_ttft(Candidate("p0#x", "p0"), far, COSTS)
    queued, why = expected_ttft(Candidate("p0#x", "p0", queued_tokens=100), far, COSTS)
    assert idle == pytest.approx(2e-3 + 20e-4) and queued == pytest.approx(100e-4 + 20e-4)
    assert why == "max(queue 10.0 | fetch 2.0 | encode 0.0) + compute 2.0 ms"


def test_pins_exclusions_and_drains() -> None:
    demand = Demand(10, (), reuse=True)
    assert choose(workers(9999, 0), demand, COSTS, pin="p0").worker_id == "p0#x"
    with pytest.raises(BadRequest, match=r"p7.*known: p0, p1"):
        choose(workers(0, 0), demand, COSTS, pin="p7")
    assert choose(workers(0, 5), demand, COSTS, exclude=["p0#x"]).worker_id == "p1#x"
    with pytest.raises(WorkerLost):
        choose(workers(0), demand, COSTS, exclude=["p0#x"])
    with pytest.raises(WorkerLost):
        choose(workers(0, draining=True), demand, COSTS)


@given(
    queued=st.lists(st.integers(0, 10_000), min_size=1, max_size=6),
    holders=st.sets(st.integers(0, 5)),
    text=st.integers(1, 500),
    data=st.data(),
)
def test_nobody_else_would_have_been_faster(
    queued: list[int], holders: set[int], text: int, data: st.DataObject
) -> None:
    candidates = workers(*queued)
    demand = Demand(text, (span({f"p{i}#x" for i in holders}),), reuse=data.draw(st.booleans()))
    choice = choose(candidates, demand, COSTS)
    best = min(expected_ttft(candidate, demand, COSTS)[0] for candidate in candidates)
    assert choice.expected_s <= best + 1e-4


def test_an_image_that_is_being_computed_is_waited_for() -> None:
    pending = SpanDemand(KEY, 1000, kv_bytes=1_000_000, recompute=20, producer="p1#x")
    demand = Demand(50, (pending,), reuse=True)
    assert active_tokens(demand) == 70
    here, _ = expected_ttft(workers(0, 0)[1], demand, COSTS)
    there, _ = expected_ttft(workers(0, 0)[0], demand, COSTS)
    assert here == pytest.approx(70 * 1e-4) and there == pytest.approx(here + 1e-3 + 1e6 / 1e9)


def test_the_policies_it_is_measured_against() -> None:
    candidates = workers(0, 9999, 0)
    homes = {n: choose(candidates, home_of(n), COSTS, policy=affinity).worker_id for n in range(40)}
    assert set(homes.values()) == {"p0#x", "p1#x", "p2#x"}
    busy = next(n for n, home in homes.items() if home == "p1#x")
    held = Demand(50, (span({"p1#x"}, key=bytes([busy]) * 32),), reuse=True)
    turns = Turns()
    chosen: dict[str, list[str]] = {name: [] for name in POLICIES}
    for _ in range(6):
        for name, policy in POLICIES.items():
            choice = choose(candidates, held, COSTS, turns=turns, policy=policy)
            assert choice.active_tokens == 70
            chosen[name].append(choice.worker_id)
        turns.taken(chosen["round-robin"][-1])
    assert set(chosen["least-ttft"]) == {"p0#x", "p2#x"}
    assert set(chosen["affinity"]) == {"p1#x"}
    assert chosen["round-robin"] == ["p0#x", "p1#x", "p2#x"] * 2
    assert len(set(chosen["random"])) > 1
    mixed = Demand(0, (*home_of(busy).spans, *home_of(busy).spans, *home_of(0).spans), reuse=True)
    assert choose(candidates, mixed, COSTS, policy=affinity).worker_id == "p1#x"


def home_of(n: int) -> Demand:
    return Demand(0, (span(set(), key=bytes([n]) * 32),), reuse=True)
