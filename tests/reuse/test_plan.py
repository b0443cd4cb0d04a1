"""Spellings of recompute plans, and what they mean."""

import math
from fractions import Fraction

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_dist.errors import InvalidPlan
from vlcache_dist.reuse.plan import LayerCounts, LayerPercents, Plan
from vlcache_dist.reuse.plan_file import parse_plan_file, resolve_plan

percents = st.decimals(0, 100, places=2).map(lambda d: format(d.normalize(), "f"))


@st.composite
def spellings(draw):
    form = draw(st.sampled_from(["none", "full", "uniform", "pyramid", "counts", "percents"]))
    if form in ("none", "full"):
        return form
    if form in ("counts", "percents"):
        values = st.integers(0, 200).map(str) if form == "counts" else percents
        chosen = sorted(draw(st.lists(values, min_size=4, max_size=4)), key=Fraction, reverse=True)
        return f"{form}:{','.join(chosen)}"
    minimum = draw(st.sampled_from(["", ",min=0", ",min=3", ",min=64"]))
    if form == "uniform":
        return f"uniform:{draw(percents)}{minimum}"
    last, first = sorted([draw(percents), draw(percents)], key=Fraction)
    return f"pyramid:{first}-{last}{minimum}"


@given(spellings(), st.integers(1, 300))
def test_any_plan(spelling, num_tokens):
    plan = Plan.parse(spelling)
    counts = plan.counts(num_tokens, 4)
    assert list(counts) == sorted(counts, reverse=True)
    assert all(0 <= count <= num_tokens for count in counts)
    depths = plan.depths(num_tokens, 4)
    assert depths.dtype == np.int32 and depths.shape == (num_tokens,)
    assert depths.tolist() == [sum(count > i for count in counts) for i in range(num_tokens)]
    assert not depths.flags.writeable, "the same array is given to all who ask"
    assert plan.is_full(num_tokens, 4) == bool((depths == 4).all())
    assert plan.is_none(num_tokens, 4) == bool((depths == 0).all())
    again = Plan.parse(str(plan))
    assert again == plan and str(again) == str(plan) and hash(again) == hash(plan)
    assert again.counts(num_tokens, 4) == counts


@pytest.mark.parametrize(
    ("spelling", "counts"),
    [
        ("none", (0, 0, 0, 0)),
        ("full", (40, 40, 40, 40)),
        ("uniform:5", (2, 2, 2, 2)),  # exactly: no rounding error turns 2 into 3
        ("uniform:5.01", (3, 3, 3, 3)),
        ("uniform:2,min=16", (16, 16, 16, 16)),
        ("uniform:2,min=64", (40, 40, 40, 40)),
        ("pyramid:20-5", (8, 6, 4, 2)),
        ("pyramid:100-0", (40, 27, 14, 0)),
        ("pyramid:20-0,min=1", (8, 6, 3, 1)),
        ("counts:80,4*2,0", (40, 4, 4, 0)),
        ("percents:50,2.5*3", (20, 1, 1, 1)),
    ],
)
def test_counts_of_40_tokens_in_4_layers(spelling, counts):
    assert Plan.parse(spelling).counts(40, 4) == counts


@given(st.integers(0, 10000), st.integers(1, 20000))
def test_percent_is_exact(hundredths, num_tokens):
    count = Plan.parse(f"uniform:{hundredths // 100}.{hundredths % 100:02d}").counts(num_tokens, 2)[0]
    assert count == math.ceil(Fraction(hundredths * num_tokens, 10000))


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("uniform:0", "none"),
        ("uniform:100,min=3", "full"),
        ("pyramid:5-5", "uniform:5"),
        ("uniform:05.50", "uniform:5.5"),
        ("uniform:10,min=0", "uniform:10"),
        ("counts:4,4,4,0", "counts:4*3,0"),
        ("percents:2.50,2.5", "percents:2.5*2"),
    ],
)
def test_equal_plans_have_one_spelling(spelling, canonical):
    assert str(Plan.parse(spelling)) == canonical


@pytest.mark.parametrize(
    ("spelling", "named"),
    [
        ("", "unknown form ''"),
        ("unifrom:5", "unknown form 'unifrom'"),
        ("None", "unknown form 'None'"),
        ("none:", "takes no argument"),
        ("full:1", "takes no argument"),
        ("uniform", "'' is not a percentage"),
        ("uniform:", "'' is not a percentage"),
        ("uniform: 5", "' 5' is not a percentage"),
        ("uniform:5%", "'5%' is not a percentage"),
        ("uniform:-5", "'-5' is not a percentage"),
        ("uniform:nan", "'nan' is not a percentage"),
        ("uniform:1e1", "'1e1' is not a percentage"),
        ("uniform:٥", "is not a percentage"),
        ("uniform:5\n", "is not a percentage"),
        ("uniform:101", "101: must be 0 to 100"),
        ("uniform:5,max=3", "unknown option 'max=3'"),
        ("uniform:5,min", "unknown option 'min'"),
        ("uniform:5,min=", "'' is not a number"),
        ("uniform:5,min=-1", "'-1' is not a number"),
        ("uniform:5,min=3,min=4", "'3,min=4' is not a number"),
        ("uniform:5,min=99999999", "minimum 99999999"),
        ("pyramid:20", "FIRST-LAST"),
        ("pyramid:-2", "'' is not a percentage"),
        ("pyramid:2-20", "must not recompute more"),
        ("pyramid:20-2-1", "'2-1' is not a percentage"),
        ("counts:", "'' is not a number"),
        ("counts:4,5", "layer 1 recomputes 5 tokens, more than layer 0 with 4"),
        ("counts:4*2,3,3.5", "'3.5' is not a number"),
        ("counts:4*0", "'4*0' is not 1 to 1024 layers"),
        ("counts:4*2000", "is not 1 to 1024 layers"),
        ("percents:5,5,7.5", "layer 2 recomputes 7.5 percent, more than layer 1 with 5"),
        ("percents:200", "200: must be 0 to 100"),
        ("file:/etc/passwd", "not here"),
        ("counts:" + "1," * 5000, "characters"),
    ],
)
def test_malformed_spellings_are_refused_by_name(spelling, named):
    with pytest.raises(InvalidPlan) as refused:
        Plan.parse(spelling)
    assert named in str(refused.value)


@given(st.text(max_size=40))
def test_any_text_is_a_plan_or_invalid(text):
    try:
        plan = Plan.parse(text)
    except InvalidPlan:
        return
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize("plan", [LayerCounts((4, 2)), LayerPercents((Fraction(4), Fraction(2)))])
def test_plan_of_another_depth_is_refused(plan):
    with pytest.raises(InvalidPlan, match="lists 2 layers, the model has 3"):
        plan.counts(10, 3)


def write(path, **fields):
    path.write_bytes(msgspec.json.encode({"format": 1, "model": "m", "num_layers": 3} | fields))
    return f"file:{path}"


def test_file_becomes_a_spelling_that_carries_its_content(tmp_path):
    spelling = write(tmp_path / "plan.json", counts=[9, 9, 4], provenance={"images": 12})
    plan = resolve_plan(spelling, model="m", num_layers=3)
    assert str(plan) == "counts:9*2,4"
    assert Plan.parse(str(plan)).counts(100, 3) == (9, 9, 4)
    spelling = write(tmp_path / "percents.json", percents=[20, 2.5, 0.1])
    assert str(resolve_plan(spelling, model="m", num_layers=3)) == "percents:20,2.5,0.1"
    assert str(resolve_plan("uniform:5", model="m", num_layers=3)) == "uniform:5"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"counts": [3, 2, 1], "model": "other"}, "made for model 'other', this is 'm'"),
        ({"counts": [3, 2, 1, 1], "num_layers": 4}, "says 4 layers, the model has 3"),
        ({"counts": [3, 2]}, "lists 2 layers, the model has 3"),
        ({"counts": [3, 2, 3]}, "layer 2 recomputes 3 tokens, more than layer 1 with 2"),
        ({"counts": [3, 2, -3]}, "layer 2: -3 tokens"),
        ({"counts": [3, 2, "x"]}, "$.counts[2]"),
        ({"percents": [300, 2, 1]}, "300"),
        ({"counts": [3, 2, 1], "percents": [3, 2, 1]}, "either counts or percents"),
        ({}, "either counts or percents"),
        ({"counts": [3, 2, 1], "depth": 4}, "depth"),
        ({"counts": [3, 2, 1], "format": 2}, "format 2"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, fields, named):
    spelling = write(tmp_path / "plan.json", **fields)
    with pytest.raises(InvalidPlan) as refused:
        resolve_plan(spelling, model="m", num_layers=3)
    assert named in str(refused.value) and "plan.json" in str(refused.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InvalidPlan, match="No such file"):
        resolve_plan(f"file:{tmp_path}/missing.json", model="m", num_layers=3)
    with pytest.raises(InvalidPlan, match="plan file"):
        resolve_plan(f"file:{tmp_path}", model="m", num_layers=3)
    for data in (b"", b"[]", b"{", b"\xff", b'{"format":1,"model":"m","num_layers":3,"percents":[NaN,1,1]}'):
        with pytest.raises(InvalidPlan):
            parse_plan_file(data, model="m", num_layers=3, name="plan.json")
    with pytest.raises(InvalidPlan, match="lists 2 layers"):
        resolve_plan("counts:2,1", model="m", num_layers=3)


def test_who_says_nothing_gets_probes_that_are_watched_and_verified():
    plan = resolve_plan("guarded", model="m", num_layers=10)
    assert str(plan) == "none+canary:0,3,9<0.19,again:4@8<0.005x2,left:6<0.33"
    assert (plan.depths(64, 10) > 0).sum() == 3
    larger = "none+canary:0,3,27<0.19,again:4@22<0.005x2,left:16<0.33"
    assert str(resolve_plan("guarded", model="m", num_layers=28)) == larger
    least = "none+canary:0,3,0<0.19,again:4@0<0.005x2,left:0<0.33"
    assert str(resolve_plan("guarded", model="m", num_layers=1)) == least
    with pytest.raises(InvalidPlan, match="before it travels"):
        Plan.parse("guarded")
