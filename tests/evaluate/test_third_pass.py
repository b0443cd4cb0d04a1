"""Plans ``again:..x2`` in the evaluation: outcome, answer, computed rows are the engine's, whichever pass decides."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.evaluate.cases import Case, batches
from vlcache_dist.evaluate.generated import generate
from vlcache_dist.evaluate.policies import parse_policy
from vlcache_dist.evaluate.run import Passes, under
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.ttft import openai_messages
from vlcache_dist.evaluate.workbench import Workbench

torch.set_num_threads(1)
CANARY = "none+canary:0,3,5<0.2"
NEVER = 1000.0  #: nats; every answer stays below it


@dataclass(frozen=True)
class Alarm:
    """A case that alarms; ``second`` and ``third``: nats by which these passes move its first token."""

    case: Case
    trial: Trial
    second: float
    third: float

    @property
    def between(self) -> float:
        """A limit that the second pass exceeds and the third does not."""
        return (self.second * max(self.third, 1e-6)) ** 0.5


def plan(limit: float, passes: int) -> str:
    return f"{CANARY},again:5@8<{limit:.6f}" + (f"x{passes}" if passes > 1 else "")


@pytest.fixture(scope="module")
def alarms() -> dict[str, Alarm]:
    """``shown``: the third pass stays where the second one went, and all pictures were shown before; ``new``: the last
    one was not; ``moving``: the third pass moves as well."""
    found: dict[str, Alarm] = {}
    bench = Workbench("tiny", device="cpu", dtype="float32")
    for seed in range(20, 28):
        for _, _, batch in batches([*generate("held-out", 4, seed), *generate("tune", 4, seed)]):
            together = Trial(bench, batch)
            far, near = (under(together, parse_policy(one)).settled for one in (plan(NEVER, 1), plan(0, 2)))
            assert far is not None and near is not None
            for case, second, third in zip(batch, far.moved.tolist(), near.moved.tolist(), strict=True):
                kind = "moving" if third > 1e-3 else "new" if case.donors[-1] is None else "shown"
                if second > 2e-3 and (third > 1e-3 or third < second / 10) and kind not in found:
                    found[kind] = Alarm(case, Trial(bench, [case]), second, third)
            if len(found) == 3:
                return found
    pytest.fail(f"only {sorted(found)}")


def rows(trial: Trial, done: Passes) -> int:
    """Token-layers of all the prompt's passes; the dense engine counts from the first picture on."""
    before = trial.tokens[0].spans[0].start
    return trial.num_layers * before + int(done.computed[0] + done.others[0])


@pytest.mark.parametrize("max_batch_tokens", [2048, 32])
def test_the_engine_decides_answers_and_computes_the_same(alarms: dict[str, Alarm], max_batch_tokens: int) -> None:
    """In one chunk, and in chunks smaller than a picture that stays as the first pass left it."""
    ways = [
        (kind, spelling, released)
        for kind in ("shown", "new")
        for spelling, released in (
            (plan(NEVER, 2), True),
            (plan(alarms[kind].between, 1), False),
            (plan(alarms[kind].between, 2), True),
        )
    ]
    moving = alarms["moving"]
    ways.append(("moving", plan(min(moving.second, moving.third) / 2, 2), False))
    sampling = SamplingParams(max_tokens=12, logprobs=3)
    settings = EngineSettings(
        store_bytes=32 << 20, kv_bytes=16 << 20, max_batch_tokens=max_batch_tokens, max_sequences=8
    )
    with LLM("tiny", "cpu", "float32", engine=settings) as llm:
        for kind, spelling, released in ways:
            case, trial = alarms[kind].case, alarms[kind].trial
            llm.store.clear()
            llm.engine.pool.drop_contents()
            for donor in case.donors:
                if donor is not None:
                    llm.chat(openai_messages(donor.dialogue), SamplingParams(max_tokens=1), plan="full")
            llm.engine.pool.drop_contents()
            before = sum(llm.engine.stats().layer_rows)
            out = llm.chat(openai_messages(case.dialogue), sampling, plan=spelling)
            spent = sum(llm.engine.stats().layer_rows) - before
            done = under(trial, parse_policy(spelling))
            assert done.settled is not None and out.logprobs is not None
            assert done.settled.rechecked[0] == any(report.why == "rechecked" for report in out.vlcache) == released
            assert done.settled.escalated[0] == any(report.escalated for report in out.vlcache) != released
            token_ids = done.answers.token_ids[0][: len(out.token_ids)]
            assert list(out.token_ids) == token_ids, (kind, spelling)
            logprob = float(done.answers.logprobs[0, token_ids[0]])
            assert logprob == pytest.approx(out.logprobs[0].logprob, abs=1e-4), (kind, spelling)
            decoded = trial.num_layers * (len(out.token_ids) - 1)
            assert rows(trial, done) == spent - decoded, (kind, spelling)


def test_a_third_pass_computes_what_the_second_one_did_and_some_more(alarms: dict[str, Alarm]) -> None:
    alarm = alarms["shown"]
    calm = f"{CANARY.partition('<')[0]}<{NEVER}"
    spellings = (calm, plan(NEVER, 2), plan(alarm.between, 2), plan(alarm.between, 1))
    once, twice, thrice, everything = (under(alarm.trial, parse_policy(one)) for one in spellings)
    assert thrice.settled is not None and thrice.settled.rechecked[0]
    assert everything.settled is not None and everything.settled.escalated[0]
    tokens = int(alarm.trial.known[0].sum())
    chosen = alarm.trial.num_layers * -(-tokens * 5 // 100)
    second, third = (int(b.computed[0] - a.computed[0]) for a, b in pairwise((once, twice, thrice)))
    assert 0 < second <= once.computed[0] + chosen and 0 < third - second <= chosen
    assert thrice.computed[0] < everything.computed[0]
    torch.testing.assert_close(everything.answers.logprobs, alarm.trial.full.logprobs, atol=1e-3, rtol=0)


def test_new_pictures_are_not_computed_again(alarms: dict[str, Alarm], monkeypatch: pytest.MonkeyPatch) -> None:
    trial, ran = alarms["new"].trial, []
    dense = trial.bench.dense
    run = dense.run

    def counting(*args: Any, **options: Any) -> Any:
        if args[0].shape[1] > 1:  # not the answer's tokens
            ran.append(int((args[1] < args[3].length).sum()))
        return run(*args, **options)

    monkeypatch.setattr(dense, "run", counting)
    spelling = plan(alarms["new"].between, 2).replace("5@8", "6@8")  # nothing of it is remembered but the first pass
    assert under(trial, parse_policy(spelling)).settled is not None
    tokens = trial.tokens[0]
    text = len(tokens.ids) - tokens.spans[0].start - sum(span.length for span in tokens.spans)
    second, third = ran[-2:]
    assert text < second < third < text + tokens.spans[-1].length
