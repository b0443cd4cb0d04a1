"""The evaluation's dense forward computes what the engine computes: same donors, same plans, same distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.errors import InvalidPlan
from vlcache_dist.evaluate.cases import Case, Donor
from vlcache_dist.evaluate.generated import generate
from vlcache_dist.evaluate.policies import parse_policy
from vlcache_dist.evaluate.report import Outcome
from vlcache_dist.evaluate.run import evaluate, under
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.ttft import openai_messages
from vlcache_dist.evaluate.workbench import Workbench

torch.set_num_threads(1)
SAMPLING = SamplingParams(max_tokens=12, logprobs=3)


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", "cpu", "float32", engine=EngineSettings(store_bytes=32 << 20, kv_bytes=16 << 20))


def picked() -> list[Case]:
    cases = generate("tune", 1, seed=5)
    return [case for case in cases if case.format in ("other text before", "question first", "swapped labels")]


@pytest.mark.parametrize("plan", ["none", "uniform:5", "pyramid:20-2", "none+canary:0,3,5<0.5"])
def test_same_distribution_and_answer(bench: Workbench, llm: LLM, plan: str) -> None:
    for case in picked():
        llm.store.clear()
        llm.engine.pool.drop_contents()
        for donor in case.donors:
            assert donor is not None
            llm.chat(openai_messages(donor.dialogue), SAMPLING, plan="full")
        out = llm.chat(openai_messages(case.dialogue), SAMPLING, plan=plan)
        assert out.logprobs is not None
        trial = Trial(bench, [case])
        (outcome,) = list(evaluate(bench, [case], [parse_policy(plan)]))
        assert outcome.escalated == any(report.escalated for report in out.vlcache)
        if not outcome.escalated:
            answers, _ = trial.reuse(_fresh(trial, plan))
        else:
            answers = trial.full
        ours = answers.token_ids[0][: len(out.token_ids)]
        assert list(out.token_ids) == ours
        assert float(answers.logprobs[0, ours[0]]) == pytest.approx(out.logprobs[0].logprob, abs=1e-4)


def _fresh(trial: Trial, plan: str) -> np.ndarray:
    fresh = np.zeros((trial.num_layers, *trial.known.shape), bool)
    for here in trial.columns[0]:
        from vlcache_dist.reuse.plan import Plan

        depths = Plan.parse(plan).depths(here.stop - here.start, trial.num_layers)
        fresh[:, 0, here] = np.arange(trial.num_layers)[:, None] < depths
    return fresh


def test_a_full_recompute_is_the_full_run_and_batches_do_not_matter(bench: Workbench) -> None:
    cases = picked()
    together = Trial(bench, cases)
    everything = np.ones((together.num_layers, *together.known.shape), bool)
    answers, _ = together.reuse(everything)
    torch.testing.assert_close(answers.logprobs, together.full.logprobs, atol=2e-4, rtol=0)
    for b, case in enumerate(cases):
        alone = Trial(bench, [case])
        torch.testing.assert_close(alone.full.logprobs[0], together.full.logprobs[b], atol=2e-4, rtol=0)


def test_resuming_from_a_layer_boundary(bench: Workbench) -> None:
    """From the embeddings on it is a full run; where the context is the donor's, from any boundary; elsewhere what lies
    above the boundary is right and what lies below is not."""
    swapped = next(case for case in picked() if case.format == "swapped labels")
    same = Case("same", swapped.dialogue, swapped.answers, tuple(Donor(swapped.dialogue, n) for n in range(2)))
    for case, boundaries in ((swapped, (0,)), (same, (0, 4, 9))):
        for boundary in boundaries:
            trial = Trial(bench, [case])
            answers = under(trial, parse_policy(f"resume:{boundary}")).answers
            torch.testing.assert_close(answers.logprobs, trial.full.logprobs, atol=2e-4, rtol=0)
    trial = Trial(bench, [swapped])
    done = under(trial, parse_policy("resume:9"))
    assert done.computed[0] == trial.known.sum()
    assert float((done.answers.logprobs - trial.full.logprobs).abs().max()) > 0.1, "its role came from below"
    with pytest.raises(InvalidPlan, match="10 layers"):
        under(trial, parse_policy("resume:10"))


def test_policies_do_what_they_say(bench: Workbench) -> None:
    """Reuse without rotation fails where reuse with it does not; swapped labels fail, and the canary sees it."""
    cases = generate("tune", 3, seed=2)
    cases = [c for c in cases if c.format in ("other text before", "swapped labels")]
    names = ["full", "none", "unrotated", "uniform:5", "none+canary:0,3,5<0.5"]
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in evaluate(bench, cases, [parse_policy(name) for name in names]):
        found.setdefault((outcome.format, outcome.policy), []).append(outcome)

    def mean(format_: str, policy: str, field: str) -> float:
        return float(np.mean([getattr(o, field) for o in found[format_, policy]]))

    quiet, loud = "other text before", "swapped labels"
    assert mean(quiet, "full", "right") == mean(quiet, "none", "right") == 1.0
    assert mean(quiet, "unrotated", "kl") > 0.5 > mean(quiet, "none", "kl")
    assert mean(loud, "none", "right") < 0.7
    assert mean(loud, "none+canary:0,3,5<0.5", "right") == mean(loud, "full", "right") == 1.0
    assert mean(loud, "none+canary:0,3,5<0.5", "escalated") == 1.0
    assert mean(quiet, "none+canary:0,3,5<0.5", "escalated") == 0.0
    assert mean(quiet, "none", "computed_share") == 0.0 and mean(quiet, "full", "computed_share") == 1.0
    extra = mean(loud, "none+canary:0,3,5<0.5", "computed_share") - 1
    tokens = mean(loud, "none", "reused_tokens")
    assert 3 / tokens < extra < 12 / tokens, "three probes of either picture, and everything behind them"
    assert mean(loud, "full", "kl") < 1e-6 and mean(loud, "full", "edit") == 0
    assert mean(quiet, "none", "flops") < mean(quiet, "uniform:5", "flops") < mean(quiet, "full", "flops")


def test_a_shift_moves_all_tokens_by_what_the_probes_gained() -> None:
    """Where every token's K and V changed by the same amount, a few probes repair all of them exactly; and in swapped
    pictures most answers come back."""
    from vlcache_dist.evaluate.dense import DenseModel, Shift
    from vlcache_dist.evaluate.generated import generate
    from vlcache_dist.evaluate.policies import parse_policy
    from vlcache_dist.evaluate.report import rows
    from vlcache_dist.evaluate.run import evaluate
    from vlcache_dist.evaluate.workbench import Workbench

    bench = Workbench("tiny", device="cpu", dtype="float32")
    dense: DenseModel = bench.dense
    torch.manual_seed(0)
    cache = dense.new_cache(1, 9)
    config = dense.config
    old, change = torch.randn(2, 8, config.num_kv_heads, config.head_dim), torch.randn(2, 1, config.num_kv_heads, 1)
    positions = torch.arange(8).expand(3, -1)
    stale, probes = torch.tensor([0, 1, 3, 4, 6, 7]), torch.tensor([2, 5])
    cache.k[0, 0, :8], cache.v[0, 0, :8] = dense.rotate(old[0][None], positions[:, None])[0], old[1]
    fresh = old + change
    shift = Shift(0, torch.arange(2), old[0, probes][None], old[1, probes][None], stale, positions[:, stale])
    dense._shift(0, shift, fresh[0, probes][None], fresh[1, probes][None], cache)
    expected = dense.rotate(fresh[0][None], positions[:, None])[0]
    assert torch.allclose(cache.k[0, 0, stale], expected[stale], atol=1e-5)
    assert torch.allclose(cache.v[0, 0, stale], fresh[1, stale], atol=1e-5)

    cases = [case for case in generate("tune", 8, 3) if case.format == "swapped labels"]
    found = rows(evaluate(bench, cases, [parse_policy("none"), parse_policy("shift:3")]))
    none, shifted = (row["exact_match"] for row in found if row["format"] == "all")
    assert shifted >= none + 0.25


def test_attention_is_what_the_last_token_pays(bench: Workbench) -> None:
    """A distribution over the keys; where all is fresh, moving the picture's V by its attention moves the output so."""
    (case,) = [c for c in generate("tune", 1, seed=5) if c.format == "question first"]
    trial = Trial(bench, [case])
    everything = np.ones((trial.num_layers, *trial.known.shape), bool)
    paid = trial.attention(everything)
    assert paid.shape == (trial.num_layers, 1, trial.known.shape[1])
    assert (paid >= 0).all() and (paid.sum(-1) < 1 + 1e-5).all() and paid.sum(-1).max() > 0.05
    nothing = trial.attention(np.zeros_like(everything))
    np.testing.assert_allclose(paid[0], nothing[0], atol=1e-5, err_msg="layer 0 sees the same K in any context")


def test_few_tokens_chosen_by_attention_repair_a_changed_role(bench: Workbench) -> None:
    cases = [case for case in generate("tune", 8, 3) if case.format == "swapped labels"]
    names = ["none", "uniform:5", "attend:5@8+shift:1"]
    found: dict[str, list[Outcome]] = {}
    for outcome in evaluate(bench, cases, [parse_policy(name) for name in names]):
        found.setdefault(outcome.policy, []).append(outcome)
    kl = {name: float(np.mean([o.kl for o in found[name]])) for name in names}
    assert kl["attend:5@8+shift:1"] < 0.1 * kl["uniform:5"], kl
    assert np.mean([o.right for o in found["attend:5@8+shift:1"]]) > 0.5 + np.mean([o.right for o in found["none"]])
    # 5 % in all layers, 2 shift probes in all layers, and those once more in layers 0 to 8
    for outcome in found["attend:5@8+shift:1"]:
        tokens = outcome.reused_tokens
        assert outcome.computed_share == pytest.approx((10 * (-(-tokens // 20) + 2) + 9 * 2) / (10 * tokens))
    assert found["attend:5@8+shift:1"][0].flops > found["none"][0].flops
    with pytest.raises(InvalidPlan, match="10 layers"):
        list(evaluate(bench, cases[:1], [parse_policy("attend:5@10")]))
