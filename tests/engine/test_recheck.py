"""The second pass behind an alarm: what it computes, when its answer is released, and what may not be kept of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import World

from vlcache_dist.engine.api import Mode, Reuse
from vlcache_dist.engine.recheck import attended, last_row, moved
from vlcache_dist.errors import StoreFull
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.reuse.canary import Again
from vlcache_dist.types import ObjectKind

QUESTION = (5, 6, 7, 8, 9)
BEFORE = (40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50)


def plan(limit: str, percent: int = 20) -> str:
    """A canary that always alarms, and a second pass."""
    return f"none+canary:0,2,1<0.000001,again:{percent}@1<{limit}"


def world(**options: Any) -> World:
    """Pictures a (16 tokens) and b (8), recorded behind other text."""
    made = World(**options)
    made.picture("a")
    made.picture("b", (1, 4, 8))
    made.ask([3, "a", 5])
    made.ask([3, "b", 5])
    return made


@pytest.mark.parametrize("budget", [512, 12], ids=["one-chunk", "many-chunks"])
def test_an_answer_that_stays_is_released(budget: int) -> None:
    each = world(max_batch_tokens=budget)
    result = each.ask([BEFORE, "a", 2, "b", QUESTION], plan=plan("900"), max_tokens=3)
    assert result.done is not None and result.done.discarded is None
    reports = result.done.reports
    assert [(r.why, r.escalated) for r in reports] == [("rechecked", False)] * 2
    assert all(r.deviation is not None and r.deviation > 1 for r in reports)
    assert sum(r.recomputed_tokens for r in reports) == 4 + 5  # two probes each, and 20 % of 24
    stats = each.engine.stats()
    assert (stats.spans_rechecked, stats.spans_escalated) == (2, 0)
    each.assert_idle_but_objects()


@pytest.mark.parametrize("budget", [512, 12], ids=["one-chunk", "many-chunks"])
@pytest.mark.parametrize("again", [("900", 100), ("0", 20)], ids=["all-computed", "escalated"])
def test_all_tokens_or_an_answer_that_moves_give_the_full_one(again: tuple[str, int], budget: int) -> None:
    each = world(max_batch_tokens=budget)
    prompt = [BEFORE, "a", (1, 2), "b", QUESTION]
    full = each.ask(prompt, reuse="off", max_tokens=3)
    first = each.ask(prompt, plan="none+canary:0,2,1<900", max_tokens=1)
    each.engine.pool.drop_contents()
    result = each.ask(prompt, plan=plan(*again), max_tokens=3)
    assert result.tokens == full.tokens and result.done is not None
    for ours, theirs in zip(result.logprobs, full.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    escalated = again[0] == "0"
    assert [r.escalated for r in result.done.reports] == [escalated] * 2
    if escalated:
        assert [r.why for r in result.done.reports] == ["canary"] * 2
        assert result.done.discarded is not None, "the guard is to know what reuse would have said"
        assert result.done.discarded[0] == first.tokens[0]
    each.assert_idle_but_objects()


def test_what_the_probes_gained_is_lent_to_all_tokens() -> None:
    """The corrected copy is the donor's KV plus, averaged over the probes, this context's KV less the donor's, before
    rotation; the object itself stays as it was."""
    each, other = world(), World()
    other.picture("a")
    other.ask([BEFORE, "a", QUESTION])
    generation = each.generation([BEFORE, "a", QUESTION], plan="full", max_tokens=2)
    each.run(generation, mode=Mode.PREFILL)
    kv = each.store.lookup(ObjectKind.KV, each.key("a"))
    assert kv is not None
    probes, span = np.array([2, 9]), generation.spans[0]
    sequence = each.engine._sequences[generation.request_id]
    slots, positions = sequence.slots(span.start, span.end)[probes], sequence.positions[:, span.start + probes]
    copy = each.store.stage(kv.elements, each.now)
    before = each.object_of("a").clone()
    each.engine.runner.lend((kv.offset, span.length), probes, slots, positions, copy)
    gained = (other.object_of("a") - before)[:, :, probes].mean(2, keepdim=True)
    assert gained.abs().max() > 1e-2
    torch.testing.assert_close(each.arena.kv_view(copy, span.length), before + gained, rtol=0, atol=1e-4)
    assert torch.equal(each.object_of("a"), before)
    each.store.abort(copy)


def test_reread_is_the_pass_that_was() -> None:
    """The same distribution as the pass drew from; attention sums to one a head; no page changes."""
    each = world()
    generation = each.generation([BEFORE, "a", QUESTION], plan="uniform:30", max_tokens=2)
    (result,) = each.run(generation, mode=Mode.PREFILL)
    sequence, pages = each.engine._sequences[generation.request_id], each.pages.clone()
    logprobs, paid = last_row(each.engine.runner, sequence, 1)
    torch.testing.assert_close(torch.from_numpy(logprobs), result.logprobs[0], rtol=0, atol=1e-4)
    assert paid.shape == (len(generation.token_ids),) and (paid >= 0).all()
    assert paid.sum() == pytest.approx(each.model.config.num_heads, abs=1e-4)
    assert torch.equal(each.pages, pages)


def test_the_most_attended_stale_tokens_are_chosen() -> None:
    each = world()
    generation = each.generation([BEFORE, "a", 2, "b", QUESTION], plan=plan("900"), max_tokens=2)
    each.add(generation)
    each.step()
    each.resolve()
    sequence = each.engine._sequences[generation.request_id]
    a, b = generation.spans
    paid = np.zeros(sequence.num_prompt, np.float32)
    paid[b.start + 3], paid[a.start + 9], paid[a.start + 5] = 0.5, 0.4, 0.3
    paid[a.start + 4] = 9.0  # a probe: it is computed anyway
    assert [int(t) for t in sequence.probes(0)] == [4, 12]
    chosen = attended(sequence, 0, Again(12.5, 1, 1.0), paid)
    assert {index: tokens.tolist() for index, tokens in chosen.items()} == {0: [5, 9], 1: [3]}
    assert list(attended(sequence, 1, Again(12.5, 1, 1.0), paid)) == [1], "spans before the alarm stay as they are"
    each.drive()


def test_moved_is_the_divergence_and_not_finite_is_far() -> None:
    p, q = np.log(np.array([0.5, 0.5], np.float32)), np.log(np.array([0.9, 0.1], np.float32))
    assert moved(p, p) == 0
    assert moved(p, q) == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2), abs=1e-6)
    assert moved(p, np.array([0.0, -np.inf], np.float32)) == float("inf")


def test_nobody_starts_with_blocks_that_are_right_for_one_question() -> None:
    each = world()
    prompt = [BEFORE, "a", QUESTION]
    span = each.generation(prompt).spans[0]
    each.ask(prompt, plan=plan("900"), max_tokens=8)
    for options in ({"plan": plan("900")}, {"reuse": "exact"}):
        again = each.ask([*prompt, 3], **options)
        assert again.admitted is not None and again.admitted.cached_tokens <= span.start
    assert each.engine.stats().spans_rechecked == 2


def test_without_room_for_a_copy_the_second_pass_uses_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    each = world()
    stage, size = each.store.stage, each.layout.kv_elements(16)

    def full(elements: int, now: float, **options: Any) -> Extent:
        if elements == size:
            raise StoreFull("no room")
        return stage(elements, now, **options)

    monkeypatch.setattr(each.store, "stage", full)
    result = each.ask([BEFORE, "a", QUESTION], plan=plan("900"), max_tokens=2)
    assert result.done is not None and result.done.reports[0].why == "rechecked"
    each.assert_idle_but_objects()


@pytest.mark.parametrize("what", ["reread", "lend"])
def test_a_second_pass_that_fails_is_that_requests_failure(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    each = world()

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(each.engine.runner, what, broken)
        result = each.ask([BEFORE, "a", QUESTION], plan=plan("900"), max_tokens=2)
    assert result.failed is not None and not result.tokens
    each.assert_idle_but_objects()
    assert each.ask([BEFORE, "a", QUESTION], plan=plan("900"), max_tokens=2).failed is None


def test_an_abort_between_the_passes_leaves_nothing() -> None:
    each = world()
    generation = each.generation([BEFORE, "a", QUESTION], plan=plan("900"), max_tokens=2)
    result = each.add(generation)
    sequence = each.engine._sequences[generation.request_id]
    while sequence.doubt is None:
        each.resolve()
        each.step()
    assert isinstance(sequence.spans[0].source, Reuse) and not result.tokens
    each.engine.abort(generation.request_id)
    each.assert_idle_but_objects()


def test_an_answer_that_moved_is_given_another_pass() -> None:
    """With x2 and a limit that the second pass exceeds and the third does not, the third answer is released; what was
    drawn at first is not, and everything is computed only when the third moves as well."""
    prompt = [BEFORE, "a", (1, 2), "b", QUESTION]
    steps = []
    for passes in (1, 2, 3):
        each = world()
        result = each.ask(prompt, plan=f"{plan('0', 30)}{f'x{passes}' if passes > 1 else ''}", max_tokens=2)
        assert result.done is not None and all(r.escalated for r in result.done.reports)
        steps.append(each.engine.stats().vision_layer_rows)
        each.assert_idle_but_objects()
    assert steps[0] < steps[1] < steps[2], "every pass computes"

    each = world()
    released = each.ask(prompt, plan=f"{plan('0', 100)}x2", max_tokens=3)
    full = each.ask(prompt, reuse="off", max_tokens=3)
    assert released.tokens == full.tokens and released.done is not None
    # The second pass has computed every token: the third finds nothing to add, and moves by rounding at most.
    each = world()
    released = each.ask(prompt, plan=f"{plan('0.000001', 100)}x2", max_tokens=3)
    assert released.done is not None and [r.why for r in released.done.reports] == ["rechecked"] * 2
    assert released.tokens == full.tokens and released.done.discarded is None
    each.assert_idle_but_objects()


def test_a_new_picture_behind_an_alarm_is_computed_once() -> None:
    """The second pass leaves it as the first one computed it; an escalation computes it again."""
    each = world()
    each.picture("new", (1, 8, 8))
    prompt = [BEFORE, "a", (1, 2), "new", QUESTION]
    before = each.engine.stats().vision_layer_rows
    result = each.ask(prompt, plan=plan("900", 25), max_tokens=3)
    layers = each.layout.num_layers
    probes, attended_tokens, new = 2, 4, 16
    assert each.engine.stats().vision_layer_rows - before == layers * (probes + probes + attended_tokens + new)
    assert result.done is not None and [r.why for r in result.done.reports] == ["rechecked", ""]
    full = world()
    full.picture("new", (1, 8, 8))
    exact = full.ask(prompt, plan=plan("0", 25), max_tokens=3)
    off = full.ask(prompt, reuse="off", max_tokens=3)
    assert exact.tokens == off.tokens
    for ours, theirs in zip(exact.logprobs, off.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    each.assert_idle_but_objects()
    full.assert_idle_but_objects()
