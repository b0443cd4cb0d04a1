"""Probe tokens, limits, spellings, and how calibration chooses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.reuse.calibrate import budget_plans, choose_limit, least_error, limit_at, roc
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.reuse.plan_file import parse_plan_file
from vlcache_dist.reuse.probes import probe_tokens


def test_probe_tokens_lead_and_stride() -> None:
    assert probe_tokens(64, 2, 3).tolist() == [0, 1, 10, 32, 53]
    assert probe_tokens(64, 0, 1).tolist() == [32]
    assert probe_tokens(4, 3, 8).tolist() == [0, 1, 2, 3]
    assert probe_tokens(16384, 0, 3).tolist() == [2730, 8192, 13653]


@pytest.mark.parametrize(
    "spelling",
    [
        "none+canary:0,3,5<0.5",
        "uniform:5,min=2+canary:2,0,1<0.25,7<3",
        "none+canary:0,3,5<0.5,again:5@8<0.02",
        "none+canary:0,3,5<0.5,again:5@8<0.02x3",
        "none+canary:1,2,1<1,5<0.5,again:0.5@9<0",
    ],
)
def test_spellings_come_back(spelling: str) -> None:
    plan = Plan.parse(spelling)
    assert str(plan) == spelling and Plan.parse(str(plan)) == plan
    assert plan.canary is not None and not plan.is_none(64, 10) and not plan.is_full(64, 10)


def test_a_full_plan_needs_no_canary() -> None:
    assert str(Plan.parse("full+canary:0,3,5<0.5")) == "full"
    assert Plan.parse("full").canary is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1,2",
        "1,2,",
        "x,2,5<1",
        "1,2,5",
        "1,2,5<-1",
        "1,2,5<1001",
        "0,0,5<1",
        "1,2,5<1,5<2",
        "1,2,6<1,5<2",
        "9999,1,5<1",
        "0,3,again:5@8<0.02",
        "0,3,again:5@8<0.02,5<1",
        "0,3,5<1,again:0@8<0.02",
        "0,3,5<1,again:101@8<0.02",
        "0,3,5<1,again:5<0.02",
        "0,3,5<1,again:5@8<0.02x1",
        "0,3,5<1,again:5@8<0.02,again:5@8<0.02",
    ],
)
def test_bad_canaries(text: str) -> None:
    with pytest.raises(InvalidPlan):
        Plan.parse(f"none+canary:{text}")


def test_a_second_pass_counts_whole_tokens() -> None:
    canary = Plan.parse("none+canary:0,3,5<0.5,again:5@8<0.02").canary
    assert canary is not None and canary.again is not None
    assert [canary.again.count(n) for n in (0, 1, 20, 21, 64)] == [0, 1, 1, 2, 4]


def test_layers_must_exist() -> None:
    with pytest.raises(InvalidPlan, match="again in layer 10"):
        Plan.parse("none+canary:0,3,5<1,again:5@10<1").depths(64, 10)
    with pytest.raises(InvalidPlan, match="layer 10"):
        Plan.parse("none+canary:0,3,10<1").depths(64, 10)


def test_depths_have_the_probes_in_every_layer() -> None:
    depths = Plan.parse("counts:8*2,0*8+canary:0,2,5<1").depths(64, 10)
    assert depths[[16, 48]].tolist() == [10, 10] and depths[:8].tolist() == [2] * 8 and depths.sum() == 36


def test_excess_is_in_units_of_the_limit() -> None:
    canary = Canary(1, 1, ((1, 0.5), (2, 2.0)))
    ratios = np.zeros((3, 2), np.float32)
    ratios[0] = 9
    assert canary.excess(ratios) == 0
    ratios[2, 1] = 1
    assert canary.excess(ratios) == 0.5
    ratios[1, 0] = 0.75
    assert canary.excess(ratios) == 1.5
    ratios[0, 0] = np.nan
    assert canary.excess(ratios) == float("inf")


def test_plan_files_carry_canaries() -> None:
    contents = {"format": 1, "model": "m", "num_layers": 2, "percents": [5, 0], "canary": "0,3,1<0.5"}
    plan = parse_plan_file(json.dumps(contents).encode(), model="m", num_layers=2, name="p")
    assert str(plan) == "percents:5,0+canary:0,3,1<0.5"
    contents["canary"] = "0,3,2<0.5"
    with pytest.raises(InvalidPlan, match="layer 2"):
        parse_plan_file(json.dumps(contents).encode(), model="m", num_layers=2, name="p")


def test_the_layer_that_separates_is_found_and_the_limit_keeps_its_distance() -> None:
    rng = np.random.default_rng(0)
    harmful = np.arange(200) < 60
    noise = rng.uniform(0.1, 0.2, (3, 200))
    noise[1, harmful] = rng.uniform(0.8, 1.2, 60)
    choice = choose_limit(noise, harmful)
    assert choice.layer == 1 and 0.3 < choice.limit < 0.5
    assert (choice.caught, choice.false_alarms) == (1.0, 0.0)
    with pytest.raises(ValueError, match="both kinds"):
        choose_limit(noise, np.zeros(200, bool))


def test_the_catch_rate_is_kept_where_kinds_overlap() -> None:
    rng = np.random.default_rng(1)
    harmful = np.arange(1000) < 300
    values = np.exp(np.where(harmful, rng.normal(0, 0.3, 1000), rng.normal(-1, 0.3, 1000)))[None]
    for catch in (0.9, 0.99):
        choice = choose_limit(values, harmful, catch)
        assert choice.caught >= catch and choice.false_alarms < 0.3


def test_a_limit_lies_between_kinds_and_not_between_luck_and_harm() -> None:
    """A third of the pictures changed their role, which harmed half of them, mostly where it shows most; in layer 1
    other formats' changes show less."""
    rng = np.random.default_rng(3)
    changed = np.arange(900) < 300
    kinds = np.where(changed, rng.normal(0, 0.2, 900), rng.normal(-2, 0.2, 900))
    harmful = changed & (kinds > 0)
    values = np.exp(np.stack([rng.normal(-1, 0.3, 900), kinds]))
    choice = choose_limit(values, harmful)
    assert choice.layer == 1 and choice.caught == 1 and 0.2 < choice.limit < np.exp(-0.5)
    assert 150 / 750 - 0.05 < choice.false_alarms < 150 / 750 + 0.05, "what changed, and nothing else"


def test_roc() -> None:
    points, area = roc(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False]))
    assert area == pytest.approx(0.75) and points[0] == (0, 0) and points[-1] == (1, 1)
    assert roc(np.ones(4), np.array([True, False, True, False]))[1] == pytest.approx(0.5)


def test_plans_of_a_budget_cost_it() -> None:
    plans = budget_plans(10, 2.0)
    assert plans[0] == "none"
    for spelling in plans[1:]:
        assert sum(Plan.parse(spelling).counts(10_000, 10)) == pytest.approx(2000, rel=0.01)
    assert least_error({"none": 0.0105, "a": 0.01, "b": 0.5}) == "none"
    assert least_error({"none": 0.2, "a": 0.01, "b": 0.5}) == "a"


def test_a_limit_at_a_stated_false_alarm_rate() -> None:
    rng = np.random.default_rng(2)
    harmful = np.arange(1000) < 300
    values = np.stack(
        [rng.uniform(0.1, 1, 1000), np.where(harmful, rng.normal(1, 0.2, 1000), rng.normal(0.5, 0.2, 1000))]
    )
    choice = limit_at(values, harmful, 0.05)
    assert choice.layer == 1 and 0.03 < choice.false_alarms <= 0.05 and choice.caught > 0.7
    assert limit_at(values, harmful, 0.0).false_alarms == 0
    assert limit_at(values, harmful, 1.0).caught == 1
    with pytest.raises(ValueError, match="both kinds"):
        limit_at(values, np.ones(1000, bool), 0.05)


def test_what_is_left_of_a_loan_is_judged_in_one_layer() -> None:
    canary = Canary.parse("0,3,5<0.42,again:5@8<0.02x2,left:7<0.35")
    assert str(canary) == "canary:0,3,5<0.42,again:5@8<0.02x2,left:7<0.35"
    assert canary.again is not None and (canary.again.passes, canary.again.left) == (2, (7, 0.35))
    left = np.full(10, 9.0)
    left[7] = 0.35
    assert canary.again.fits(left)
    assert not canary.again.fits(left + 0.01)
    left[7] = np.nan
    assert not canary.again.fits(left), "what is not finite does not fit"
    anything = Canary.parse("0,3,5<0.42,again:5@8<0.02").again
    assert anything is not None and anything.fits(np.full(10, np.inf))
    canary.check_layers(10)
    with pytest.raises(InvalidPlan, match="left in layer 9"):
        Canary.parse("0,3,5<0.42,again:5@8<0.02,left:9<0.35").check_layers(9)


@pytest.mark.parametrize(
    "spelling",
    [
        "0,3,5<0.4,left:7<0.3",
        "0,3,left:7<0.3",
        "0,3,5<0.4,left:7<0.3,again:5@8<0.02",
        "0,3,5<0.4,again:5@8<0.02,left:7",
    ],
)
def test_what_is_left_needs_a_second_pass_before_it(spelling: str) -> None:
    with pytest.raises(InvalidPlan):
        Canary.parse(spelling)
