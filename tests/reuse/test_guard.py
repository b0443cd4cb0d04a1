"""The guard as a controller: what it notices, what it leaves alone, and how it comes back."""

from __future__ import annotations

import random

import pytest

from vlcache_dist.reuse.books import MAX_FORMATS, Shadow
from vlcache_dist.reuse.evidence import HarmDetector, HealthEvidence, wilson_upper
from vlcache_dist.reuse.guard import BURST_S, Guard
from vlcache_dist.reuse.ladder import Level, always_alarmed, first_step, plan_at
from vlcache_dist.reuse.plan import Plan

WATCHED, BLIND = Plan.parse("none+canary:0,3,5<0.5"), Plan.parse("uniform:5")
CHECKED = Plan.parse("none+canary:0,3,5<0.5,again:5@8<0.02,left:7<0.4")
FINE, WRONG = Shadow(0.001, True, False), Shadow(8.0, False, False)


def drive(guard: Guard, requests: int, harm: float, rng: random.Random, plan: Plan = WATCHED) -> int | None:
    """Serve requests of which a share is harmed unless approximation is off; the first one that trips the guard."""
    for number in range(1, requests + 1):
        if guard.decide("f").sampled:
            guard.observe("f", plan, WRONG if rng.random() < harm else FINE)
        if guard.status()["formats"]["f"]["trips"]:
            return number
    return None


def test_ten_thousand_healthy_requests_do_not_trip() -> None:
    """40 times 10,000 at the harm share that counts as healthy; the bound says 1 % of the runs may trip."""
    tripped = [drive(Guard(sampling=0.05, seed=s), 10_000, 0.005, random.Random(s)) for s in range(40)]
    assert tripped == [None] * 40


def test_a_plan_that_fails_half_is_noticed_within_200_requests() -> None:
    noticed = [drive(Guard(sampling=0.05, seed=s), 1000, 0.5, random.Random(1000 + s)) for s in range(500)]
    assert all(n is not None for n in noticed)
    late = sum(n > 200 for n in noticed if n is not None)
    assert late <= 5, f"{late} of 500 runs were noticed late"


def test_weak_plans_are_noticed_too() -> None:
    noticed = [drive(Guard(sampling=0.05, seed=s), 20_000, 0.05, random.Random(s)) for s in range(20)]
    assert all(n is not None for n in noticed)


def test_half_failing_goes_off_at_once_and_comes_back_by_steps() -> None:
    guard = Guard(sampling=1.0)
    while guard.decide("f").level is not Level.OFF:
        guard.observe("f", WATCHED, WRONG)
    seen = []
    for _ in range(2000):
        level = guard.observe("f", WATCHED, FINE)
        if not seen or seen[-1] is not level:
            seen.append(level)
    assert seen == [Level.OFF, Level.STRENGTHENED, Level.TIGHTENED, Level.NORMAL]


def test_alarms_that_were_heard_are_no_harm_but_a_false_alarm_is_counted() -> None:
    guard = Guard(sampling=1.0)
    for _ in range(200):
        assert guard.observe("f", WATCHED, Shadow(8.0, False, True)) is Level.NORMAL
    guard.observe("f", WATCHED, Shadow(0.0, True, True))
    drift = guard.status()["formats"]["f"]
    assert (drift["harmed"], drift["missed_alarms"], drift["false_alarms"], drift["trips"]) == (200, 0, 1, 0)
    assert guard.observe("f", WATCHED, WRONG) is Level.NORMAL and guard.status()["formats"]["f"]["missed_alarms"] == 1


def test_trials_at_off_count_although_their_canary_called() -> None:
    guard = Guard(sampling=1.0)
    for _ in range(10):
        guard.observe("f", BLIND, WRONG)
    assert guard.decide("f").level is Level.OFF
    for _ in range(300):
        assert guard.observe("f", BLIND, Shadow(8.0, False, True)) is Level.OFF


def test_one_format_does_not_suffer_for_another() -> None:
    guard = Guard(sampling=1.0)
    for _ in range(20):
        guard.observe("bad", WATCHED, WRONG)
        guard.observe("good", WATCHED, FINE)
    assert guard.decide("bad").level is Level.OFF and guard.decide("good").level is Level.NORMAL


def test_sampling_follows_the_budget() -> None:
    """A warm request of 10 ms, a full run of 100 ms: 2 % of the time affords one shadow in 500 requests."""
    guard = Guard(budget=0.02, seed=1)
    shadows = 0
    for _ in range(50_000):
        if guard.decide("f").sampled and guard.affords:
            shadows += 1
            guard.spent(0.1)
            guard.observe("f", WATCHED, FINE)
        guard.worked(0.01)
    spent = shadows * 0.1
    assert guard.sampling == pytest.approx(0.002, rel=0.01)
    assert 0.8 * 0.02 * 500 <= spent <= 0.02 * 500 + BURST_S + 0.1


def test_without_a_budget_nothing_is_decided() -> None:
    guard = Guard(budget=0.0, sampling=1.0)
    assert not any(guard.decide("f").sampled for _ in range(100))


def test_formats_are_bounded() -> None:
    guard = Guard()
    for i in range(MAX_FORMATS + 10):
        guard.decide(str(i))
    assert len(guard.status()["formats"]) == MAX_FORMATS


@pytest.mark.parametrize(
    ("plan", "tightened", "strengthened"),
    [
        ("none+canary:0,3,5<0.5", "none+canary:0,3,5<0.25", "uniform:20+canary:0,3,5<0.125"),
        (
            "none+canary:0,3,5<0.5,again:5@8<0.02,left:7<0.4",
            "none+canary:0,3,5<0.25,again:5@8<0.01,left:7<0.2",
            "uniform:20+canary:0,3,5<0.125",
        ),
        ("uniform:5", "uniform:5", "uniform:20"),
        ("pyramid:40-2,min=16", "pyramid:40-2,min=16", "pyramid:100-20,min=64"),
        ("counts:80*2,10", "counts:80*2,10", "counts:320*2,40"),
        ("percents:30,2*2", "percents:30,2*2", "percents:100,20*2"),
    ],
)
def test_levels_change_plans(plan: str, tightened: str, strengthened: str) -> None:
    parsed = Plan.parse(plan)
    assert str(plan_at(parsed, Level.TIGHTENED)) == tightened
    assert str(plan_at(parsed, Level.STRENGTHENED)) == strengthened
    assert plan_at(parsed, Level.NORMAL) is parsed
    assert first_step(parsed) is (Level.TIGHTENED if "canary" in plan else Level.STRENGTHENED)


def test_a_trial_always_alarms() -> None:
    import numpy as np

    for plan in (WATCHED, CHECKED, BLIND):
        trial = Plan.parse(str(always_alarmed(plan)))
        assert trial.canary is not None and trial.canary.excess(np.zeros((10, 3))) > 1
        assert trial.canary.again is None, "what reuse would have said is compared with the full answer"


def test_evidence() -> None:
    """The recursion by hand, and the supermartingale that the bound rests on: E[R_n] <= n under health."""
    detector = HarmDetector(10.0)
    detector.observe(True)
    assert detector.value == pytest.approx((100 + 20 + 6) / 3 / 10)
    rng = random.Random(3)
    over = 0
    for _ in range(400):
        detector = HarmDetector(5000.0)  # 50 runs, 1 %
        over += any(detector.observe(rng.random() < 0.005) for _ in range(50))
    assert over <= 10  # 4 expected at most
    health = HealthEvidence()
    assert [health.observe(False) for _ in range(66)].index(True) == 64
    assert wilson_upper(0, 0) == 1.0 and wilson_upper(0, 50) == pytest.approx(0.0513, abs=1e-3)
