"""The second pass in the evaluation: the engine's verdicts and answers, what it costs, how calibration chooses it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.errors import InvalidPlan
from vlcache_dist.evaluate.calibration import Calibration, Goal, calibrate, summary, write_plan
from vlcache_dist.evaluate.cases import Case
from vlcache_dist.evaluate.cli import checkpoint as open_checkpoint
from vlcache_dist.evaluate.detector import verdicts
from vlcache_dist.evaluate.errors import split
from vlcache_dist.evaluate.generated import generate
from vlcache_dist.evaluate.journal import Journal
from vlcache_dist.evaluate.names import second_pass, spell_out, under_names
from vlcache_dist.evaluate.policies import parse_policy
from vlcache_dist.evaluate.report import Outcome
from vlcache_dist.evaluate.run import evaluate, under
from vlcache_dist.evaluate.second_pass import PERCENTS, best_repair, choose_second_pass
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.ttft import openai_messages
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.evaluate.workers import BenchSpec
from vlcache_dist.reuse.canary import Canary
from vlcache_dist.reuse.plan_file import resolve_plan

torch.set_num_threads(1)
SPEC = BenchSpec("tiny", "cpu", "float32")
GUARDED = str(resolve_plan("guarded", model="", num_layers=10))
ONCE = GUARDED.replace("x2,", ",")


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench("tiny", device="cpu", dtype="float32")


def role_changes(count: int) -> list[Case]:
    wanted = ("long prefix", "sliding window", "alone, then one of three", "recorded with rows from the bottom")
    return [case for case in generate("held-out", count, seed=8) if case.format in wanted]


def test_the_engine_comes_to_the_same_verdicts_and_answers(bench: Workbench) -> None:
    seen = set()
    with LLM("tiny", "cpu", "float32", engine=EngineSettings(store_bytes=32 << 20, kv_bytes=16 << 20)) as llm:
        for case in role_changes(3):
            llm.store.clear()
            llm.engine.pool.drop_contents()
            for donor in case.donors:
                if donor is not None:
                    llm.chat(openai_messages(donor.dialogue), SamplingParams(max_tokens=1), plan="full")
            llm.engine.pool.drop_contents()
            sampling = SamplingParams(max_tokens=12, logprobs=3)
            out = llm.chat(openai_messages(case.dialogue), sampling, plan="guarded")
            done = under(Trial(bench, [case]), parse_policy(GUARDED))
            assert done.settled is not None and out.logprobs is not None
            verdict = (bool(done.settled.rechecked[0]), bool(done.settled.escalated[0]))
            assert verdict == (
                any(report.why == "rechecked" for report in out.vlcache),
                any(report.escalated for report in out.vlcache),
            )
            seen.add(verdict)
            token_ids = done.answers.token_ids[0][: len(out.token_ids)]
            assert list(out.token_ids) == token_ids
            logprob = float(done.answers.logprobs[0, token_ids[0]])
            assert logprob == pytest.approx(out.logprobs[0].logprob, abs=1e-4)
    assert seen == {(False, False), (True, False), (False, True)}, "the cases must show every way"


def test_every_pass_is_counted(bench: Workbench) -> None:
    wanted = ("sliding window", "question first, pictures swapped")
    cases = [case for case in generate("held-out", 6, seed=8) if case.format in wanted]
    kinds = {}
    for outcome in evaluate(bench, cases, [parse_policy(ONCE)]):
        kinds[outcome.rechecked, outcome.escalated] = outcome
    rechecked, escalated = kinds[True, False], kinds[False, True]
    for outcome, everything in ((rechecked, 0), (escalated, 1)):
        tokens = outcome.reused_tokens
        twice = 2 * 6 / tokens  # three probes of either reused picture
        assert outcome.computed_share == pytest.approx(twice + -(-tokens // 25) / tokens + everything)
    assert rechecked.moved is not None and escalated.moved is not None
    assert rechecked.moved <= 0.02 < escalated.moved
    assert rechecked.left is not None and len(rechecked.left) == 10 and rechecked.left[6] <= 0.33
    always = next(evaluate(bench, cases[:1], [parse_policy(second_pass(5, 8))]))
    tokens = always.reused_tokens
    assert always.rechecked and always.computed_share == pytest.approx((2 * 2 + -(-tokens // 20)) / tokens)
    assert rechecked.flops < escalated.flops


def test_self_and_propagated_error_are_what_their_names_say(bench: Workbench) -> None:
    """In layers 0 and 1 no token has been reached by another one's error yet; together both lead to the full run."""
    cases = [case for case in generate("tune", 2, seed=5) if case.format == "swapped labels"]
    trial = Trial(bench, cases)
    by_self, by_others = split(trial)
    assert by_self[0].max() < 1e-5 < by_self[1].max()
    assert by_others[:2].max() < 1e-4 < by_others[6].max()
    known = trial.known
    whole = np.sqrt(trial.deviation.dv[:, known] / trial.deviation.v[:, known])
    assert (whole <= by_self[:, known] + by_others[:, known] + 1e-4).all()
    assert by_self[5][trial.known].mean() > 5 * by_others[5][trial.known].mean()


def outcome(policy: str, **changes: object) -> Outcome:
    plain = Outcome("f", policy, 1, 1, 0.0, True, True, 0, 0.05, False, 1.0)
    return replace(plain, policy=policy, **changes)  # type: ignore[arg-type]


def fake(
    moved: Sequence[float], wrong: Sequence[bool], costs: dict[float, float], left: Sequence[float] = ()
) -> object:
    """A measurement of as many alarms, the first half of them harmful, and as many calm cases. ``left``: of each alarm
    in layer 1 of two. A third pass releases what fits, rightly, for 1 % more."""
    left = left or [0.1] * len(moved)

    def measure(spellings: Sequence[str]) -> dict[str, list[Outcome]]:
        found = {}
        for spelling in spellings:
            half = len(moved) // 2
            calm = [outcome(spelling) for _ in moved]
            if "again" in spelling:
                percent = float(spelling.partition("again:")[2].partition("@")[0])
                extra = 0.05 + costs[percent]
                again = Canary.parse(spelling.partition("canary:")[2]).again
                assert again is not None
                if again.passes > 1:
                    fits = [again.fits(np.array([0.2, one])) for one in left]
                    found[spelling] = [
                        outcome(
                            spelling, alarmed=True, rechecked=f, escalated=not f, computed_share=extra + 0.01 + (not f)
                        )
                        for f in fits
                    ] + calm
                    continue
                found[spelling] = [
                    outcome(
                        spelling,
                        alarmed=True,
                        rechecked=True,
                        moved=m,
                        kl=8.0 * w,
                        computed_share=extra,
                        left=[0.2, one],
                    )
                    for m, w, one in zip(moved, wrong, left, strict=True)
                ] + calm
            elif "<1000" in spelling:
                found[spelling] = [outcome(spelling, kl=8.0 * (i < half)) for i in range(len(moved))] + calm
            else:
                alarm = outcome(spelling, alarmed=True, escalated=True, computed_share=1.05)
                found[spelling] = [alarm] * len(moved) + calm
        return found

    return measure


CANARY = Canary.parse("0,3,5<0.42")


def test_the_cheapest_second_pass_within_the_bound_is_chosen() -> None:
    moved, wrong = [5.0] * 10 + [0.0] * 10, [True] * 10 + [False] * 10
    costs = {percent: percent / 100 for percent in PERCENTS}
    again, record = choose_second_pass(fake(moved, wrong, costs), "none", CANARY, [8], 0.01)  # type: ignore[arg-type]
    assert again is not None and (again.percent, again.layer) == (PERCENTS[0], 8) and again.limit < 0.1
    assert again.passes == 2 and again.left is None, (
        "a third pass is cheaper, and nothing is wrong without having moved"
    )
    assert (record["alarms"], record["harmful"], record["released"], record["released_harmful"]) == (20, 10, 20, 0)
    assert record["computed_share_without"] == pytest.approx((1.05 + 0.05) / 2)
    assert record["computed_share"] == pytest.approx((0.05 + costs[2.0] + 0.01 + 0.05) / 2)
    assert record["computed_share_calm"] == pytest.approx(0.05)
    once = next(one for one in record["tried"] if one["again"] == str(replace(again, passes=1)))
    assert (once["released"], once["released_harmful"]) == (10, 0)
    assert once["computed_share"] == pytest.approx((0.05 + costs[2.0] + 0.5 + 0.05) / 2)


def test_what_is_wrong_without_having_moved_is_told_by_what_is_left() -> None:
    moved, wrong = [5.0] * 6 + [0.0] * 14, [True] * 10 + [False] * 10
    left = [0.2] * 6 + [0.9] * 4 + [0.1] * 10
    costs = {percent: percent / 100 for percent in PERCENTS}
    again, record = choose_second_pass(fake(moved, wrong, costs, left), "none", CANARY, [8], 0.0)  # type: ignore[arg-type]
    assert again is not None and again.left is not None
    layer, limit = again.left
    assert layer == 1 and 0.1 < limit < 0.9
    assert (record["released"], record["released_harmful"]) == (16, 0)


@pytest.mark.parametrize(("moved", "why"), [(5.0, "nothing is released"), (0.0, "what is wrong does not move")])
def test_a_second_pass_that_saves_nothing_is_not_made(moved: float, why: str) -> None:
    measure = fake([moved] * 20, [True] * 20, dict.fromkeys(PERCENTS, 0.1))
    again, record = choose_second_pass(measure, "none", CANARY, [8], 0.0)  # type: ignore[arg-type]
    assert again is None and record["released_harmful"] == 0, why


def test_a_repair_keeps_its_budget() -> None:
    rows = {"none": 5.0, "uniform:5": 4.0, "blend:5": 4.5, second_pass(3, 8): 0.1, second_pass(5, 8): 0.01}
    shares = {second_pass(5, 8): 0.09}

    def means(names: Sequence[str]) -> dict[str, dict[str, float]]:
        return {
            name: {"kl": rows[name], "exact_match": 0.5, "computed_share": shares.get(name, 0.06)} for name in names
        }

    found = best_repair(means, [8], 5.0, (3.0, 5.0, 7.0))
    assert found["policy"] == second_pass(3, 8) and set(found) == {
        "policy",
        second_pass(3, 8),
        "none",
        *list(rows)[1:3],
    }


def test_what_a_plan_that_judges_itself_catches() -> None:
    unwatched = [outcome("w", kl=k) for k in (8.0, 8.0, 8.0, 0.0, 0.0)]
    released = [
        outcome("g", alarmed=True, escalated=True),
        outcome("g", alarmed=True, rechecked=True),
        outcome("g", kl=8.0),
        outcome("g", alarmed=True, escalated=True),
        outcome("g"),
    ]
    found = verdicts(unwatched, released)
    assert (found["harmful"], found["alarmed_harmful"], found["repaired"], found["released_harmful"]) == (3, 2, 1, 1)
    assert (found["caught"], found["false_alarms"], found["alarms_in_harmless"]) == (0.6667, 0.5, 0.5)


def test_names_stand_for_spellings(tmp_path: Path) -> None:
    found = spell_out(["off", "guarded", "canary", "pyramid", "uniform:5"], model="m", num_layers=10)
    assert found["off"] == "full" and found["guarded"] == GUARDED and found["canary"] == GUARDED.partition(",again")[0]
    assert spell_out(["guarded once"], model="m", num_layers=10) == {"guarded once": ONCE}
    assert parse_policy(found["pyramid"]) and found["uniform:5"] == "uniform:5"
    with pytest.raises(InvalidPlan, match="--plan"):
        spell_out(["calibrated"], model="m", num_layers=10)
    path = tmp_path / "p.json"
    path.write_text('{"format": 1, "model": "m", "num_layers": 2, "percents": [5, 0]}')
    assert spell_out(["calibrated"], model="m", num_layers=2, plan=path) == {"calibrated": "percents:5,0"}
    with pytest.raises(InvalidPlan, match="made for model"):
        spell_out([f"file:{path}"], model="other", num_layers=2)
    rows = [{"format": "f", "policy": "full", "kl": 0}]
    assert under_names(rows, {"off": "full", "full": "full"}) == [{**rows[0], "policy": "off"}, rows[0]]


def test_calibration_chooses_a_second_pass_that_the_engine_serves(tmp_path: Path) -> None:
    tune = generate("tune", 4, seed=7)
    cases = [case for case in tune if case.format in ("swapped labels", "alone, then one of two")]
    cases += [case for case in tune if case.format == "rows from the bottom, recorded without"][:2]
    cases += [case for case in tune if case.format == "question first"][:1]
    checkpoint = open_checkpoint(SPEC)
    work = Calibration(SPEC, Journal(None, {}), 1, lambda *at: None)
    goal = Goal(budget=1.0, repair=0)
    contents = calibrate(work, cases, goal, model=checkpoint.fingerprint, num_layers=10, data="test")
    assert "again:" in contents["canary"] and "second pass" in " ".join(summary(contents))
    record = contents["provenance"]["second_pass"]
    assert record["computed_share"] < record["computed_share_without"] and record["released_harmful"] == 0
    path = tmp_path / "plan.json"
    write_plan(path, contents)
    engine = EngineSettings(store_bytes=32 << 20, kv_bytes=16 << 20, plan=f"file:{path}")
    whys = set()
    with LLM("tiny", "cpu", "float32", engine=engine) as llm:
        for case in cases[:4]:
            llm.store.clear()
            llm.engine.pool.drop_contents()
            for donor in case.donors:
                assert donor is not None
                llm.chat(openai_messages(donor.dialogue), SamplingParams(max_tokens=1), plan="full")
            out = llm.chat(openai_messages(case.dialogue), SamplingParams(max_tokens=1))
            whys |= {report.why for report in out.vlcache}
    assert "rechecked" in whys or "canary" in whys

    without = calibrate(work, cases, replace(goal, release=None), model="m", num_layers=10, data="test")
    assert "again:" not in without["canary"] and "second_pass" not in without["provenance"]
    path.write_text(json.dumps(contents | {"model": "another"}))
    with pytest.raises(InvalidPlan, match="made for model"):
        LLM("tiny", "cpu", "float32", engine=engine)
