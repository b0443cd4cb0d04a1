"""Continuous batching: the same answers whatever a request is batched with, however it is cut, whoever waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine_cases import EOS, World

from vlcache_dist.engine.api import Admitted, Mode
from vlcache_dist.errors import BadRequest, ConfigError, Overloaded, PromptTooLong
from vlcache_dist.types import FinishReason, MediaSpan, ReuseMode, SamplingParams
from vlcache_dist.wire import Generation


def pictures(world: World) -> World:
    for name, grid in {"a": (1, 8, 8), "b": (1, 4, 8), "c": (2, 4, 4)}.items():
        world.picture(name, grid)
    world.ask([4, "a", 2])
    return world


def mixed(world: World) -> list[Generation]:
    """Reused, fresh, recurring, text only; all three contracts; answers of different length."""
    text = [world.text(n) for n in (9, 3, 12, 5, 7, 30)]
    return [
        world.generation([text[0], "a", text[1]], max_tokens=4),
        world.generation([text[2]], max_tokens=7),
        world.generation([text[1], "b", text[3], "a", text[4]], max_tokens=3),
        world.generation([text[3], "a", text[0]], reuse="off", max_tokens=5),
        world.generation([text[4], "c", text[1]], reuse="exact", max_tokens=2),
        world.generation([text[5], "a", text[1], "a", text[0]], plan="none", max_tokens=6),
        world.generation([text[0], "a", text[3]], plan="full", max_tokens=6),
    ]


@pytest.mark.parametrize("max_batch_tokens", [8, 9, 16, 31, 512])
@pytest.mark.parametrize("max_running", [2, 7])
def test_a_batch_answers_as_one_by_one(max_batch_tokens: int, max_running: int) -> None:
    alone, together = pictures(World(1)), pictures(World(1, max_batch_tokens=max_batch_tokens, max_running=max_running))
    # The order of arrival decides who records a picture and who reuses it, so that both see the same.
    one_by_one = [alone.run(generation)[0] for generation in mixed(alone)]
    batch = mixed(together)
    for generation in batch:
        together.add(generation)
    together.drive()
    for generation, expected in zip(batch, one_by_one, strict=True):
        result = together.results[generation.request_id]
        assert result.tokens == expected.tokens
        assert result.finish is FinishReason.LENGTH
        for got, want in zip(result.logprobs, expected.logprobs, strict=True):
            torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    alone.assert_idle()
    together.assert_idle()


@pytest.mark.parametrize("reuse", ["off", "exact", "approx"])
@pytest.mark.parametrize("max_batch_tokens", [9, 11, 14, 20])
def test_chunked_prefill_answers_the_same(max_batch_tokens: int, reuse: str) -> None:
    whole, cut = pictures(World(2)), pictures(World(2, max_batch_tokens=max_batch_tokens))
    results = []
    for world in (whole, cut):
        text = world.text(6)
        results.append(world.ask([text, "b", text, "a", text, "c", text], reuse=reuse, max_tokens=4))
    assert results[0].tokens == results[1].tokens
    for got, want in zip(results[1].logprobs, results[0].logprobs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_full_plan_equals_off() -> None:
    world = pictures(World(3))
    text = world.text(7)
    parts = [text, "a", text, "b", text]
    off = world.ask(parts, reuse="off", max_tokens=8)
    full = world.ask(parts, plan="full", max_tokens=8)
    none = world.ask([(1,), *parts[1:]], plan="none", max_tokens=8)
    assert full.done.reports[0].recomputed_tokens == 16
    assert full.tokens == off.tokens
    for got, want in zip(full.logprobs, off.logprobs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (none.logprobs[0] - off.logprobs[0]).abs().max() > 1e-3


def test_answers_come_before_prompts() -> None:
    world = World(4, max_batch_tokens=8, max_running=3)
    first = world.generation([6], max_tokens=30)
    world.add(first)
    assert [type(event) for event in world.step()] == [Admitted], "it may look for its sources during the next pass"
    world.step()
    long = world.generation([60], max_tokens=1)
    world.add(long)
    assert [type(event) for event in world.step()] == [Admitted]
    for _ in range(8):
        before = len(world.results[first.request_id].tokens)
        world.step()
        assert len(world.results[first.request_id].tokens) == before + 1
    assert world.engine._sequences[long.request_id].num_computed == 8 * 7


def test_reused_tokens_are_free() -> None:
    """A budget of 12 rows takes in a prompt of 64 reused tokens and 9 others at once."""
    world = World(5, max_batch_tokens=12, max_running=2)
    world.picture("a", (1, 16, 16))
    world.ask([4, "a", 2])
    steps = world.engine.stats().steps
    world.ask([5, "a", 4], plan="none")
    assert world.engine.stats().steps == steps + 1


def test_first_come_first_served_and_never_too_many() -> None:
    world = World(6, num_blocks=12, block_size=4, max_running=3)
    generations = [world.generation([n], max_tokens=4, reuse="off") for n in (20, 8, 30, 2, 2, 2)]
    for generation in generations:
        world.add(generation)
    admitted = []
    while world.engine.has_work():
        admitted += [event.request_id for event in world.step() if isinstance(event, Admitted)]
        world.engine.validate()
        assert world.engine.stats().running <= 3
    assert admitted == [generation.request_id for generation in generations]
    world.assert_idle()


def test_a_blocked_queue_is_no_work_until_blocks_come_back() -> None:
    world = World(7, num_blocks=8, block_size=4)
    holder = world.generation([20], max_tokens=8)
    world.run(holder, mode=Mode.PREFILL)
    world.add(world.generation([10], max_tokens=8))
    world.step()
    assert world.engine.has_work() is False
    world.engine.release(holder.request_id)
    assert world.engine.has_work()
    world.drive()
    world.assert_idle()


def test_a_shared_prefix_needs_its_blocks_once() -> None:
    """Two requests of 7 blocks, 5 of them shared, run side by side in 10."""
    world = World(8, num_blocks=10, block_size=4)
    text = world.text(20)
    first = world.generation([text, 4], max_tokens=5)
    world.run(first, mode=Mode.PREFILL)
    second = world.generation([text, 3], max_tokens=5)
    world.add(second)
    world.step()
    assert world.results[second.request_id].admitted.cached_tokens == 20
    world.engine.validate()
    world.drive()
    world.engine.release(first.request_id)
    world.assert_idle()


def test_requests_that_cannot_be_served_are_refused_at_once() -> None:
    world = World(9, num_blocks=8, block_size=4, max_waiting=2)
    world.picture("a")
    with pytest.raises(PromptTooLong, match="9 KV blocks"):
        world.add(world.generation([20], max_tokens=17))
    with pytest.raises(PromptTooLong, match="4096"):
        world.add(world.generation([20], max_tokens=4090))
    with pytest.raises(BadRequest, match="nothing is left"):
        world.add(world.generation([20], max_tokens=0))
    with pytest.raises(BadRequest, match="end with text"):
        world.add(world.generation([2, "a"]))
    with pytest.raises(BadRequest, match="end with text"):
        world.add(world.generation([]))
    overlapping = Generation(
        "x", "t", (1,) * 20, (MediaSpan(b"k" * 32, 2, 4, (1, 8, 8)),), SamplingParams(), ReuseMode.OFF, "none"
    )
    with pytest.raises(ValueError, match="do not fit the grid"):
        world.engine.add(overlapping, 0.0)
    good = world.generation([4])
    world.add(good)
    with pytest.raises(ValueError, match="here already"):
        world.add(good)
    world.add(world.generation([4]))
    with pytest.raises(Overloaded):
        world.add(world.generation([4]))
    world.drive()
    world.assert_idle()


def test_a_budget_below_the_number_of_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens = 8"):
        World(10, max_batch_tokens=8, max_running=8)


def test_end_of_sequence_and_length() -> None:
    world = World(11)
    generation = world.generation([5], max_tokens=6)
    ends = Generation(
        "e", "t", generation.token_ids, (), SamplingParams(max_tokens=6, logprobs=96), ReuseMode.OFF, "none"
    )
    drawn = SimpleNamespace(result=lambda: ([EOS], [None]))
    world.engine.runner.launch = lambda step, params, draws: drawn
    events = []
    world.engine.add(ends, 0.0)
    events += world.engine.step(0.0) + world.engine.step(0.0)  # admitted, and computed
    world.engine.add(generation, 0.0)
    while world.engine.has_work():
        events += world.engine.step(0.0)
    finishes = {e.request_id: e.finish for e in events if hasattr(e, "finish")}
    assert finishes == {"e": FinishReason.STOP, generation.request_id: FinishReason.LENGTH}
    assert len([e for e in events if hasattr(e, "finish") and e.request_id == "e"]) == 1
    assert len([e for e in events if hasattr(e, "finish") and e.request_id == generation.request_id]) == 6
    world.assert_idle()


def test_going_on_with_an_answer_that_was_begun() -> None:
    """A retry: the prompt carries the first tokens of the answer, and only the rest is generated."""
    world = pictures(World(12))
    text = world.text(5)
    whole = world.ask([text, "b", text], reuse="off", max_tokens=6)
    again = world.generation([text, "b", (*text, *whole.tokens[:2])], reuse="off", max_tokens=6)
    again = Generation(
        "again", "t", again.token_ids, again.spans, again.sampling, ReuseMode.OFF, "none", num_generated=2
    )
    assert world.run(again)[0].tokens == whole.tokens[2:]


def test_a_few_rows_before_a_missing_source_wait_for_it() -> None:
    world = World(13, max_batch_tokens=400, max_running=2)
    world.picture("a")
    short, long = world.generation([50, "a", 2]), world.generation([300, "a", 2])
    for generation in (short, long):
        world.add(generation)
    world.step()
    world.step()
    assert world.engine._sequences[short.request_id].num_computed == 0
    assert world.engine._sequences[long.request_id].num_computed == 300
    assert not world.engine.has_work()
    world.drive()
    world.assert_idle()


def test_records_that_others_wait_for_are_completed() -> None:
    """Two requests with the same pictures in opposite order: each records the one that the other waits for."""
    world = World(14)
    world.picture("a")
    world.picture("b")
    both = [world.generation([3, "a", 2, "b", 2]), world.generation([3, "b", 2, "a", 2])]
    for generation in both:
        world.add(generation)
    world.step()
    for generation in both:
        source = world.source(generation.request_id, world.results[generation.request_id].unresolved.pop(0))
        world.engine.provide(generation.request_id, 0, source)
    world.drive()
    first, second = (world.results[generation.request_id] for generation in both)
    assert first.finish is second.finish is FinishReason.LENGTH
    assert [event.span_index for event in (*first.recorded, *second.recorded)] == [0, 0]
    world.assert_idle()


def test_idle_work_waits_until_nobody_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose picture is on its way gives the engine nothing to do, but it does wait."""
    world = pictures(World(1))
    asked: list[bool] = []
    monkeypatch.setattr(world.engine.runner, "prepare", lambda: bool(asked.append(True)))
    waiting = world.generation([3, "b", 2])
    world.add(waiting)
    while world.engine.has_work():
        world.step()
    assert not world.engine.idle() and not asked
    world.drive()
    assert not world.engine.idle() and asked, "asked, and there was nothing to do"
    parked = world.generation([3, "a", 2], max_tokens=4)
    world.add(parked, Mode.PREFILL)
    world.drive()
    assert not world.engine.idle() and len(asked) == 1, "a decode worker is about to take it over"
    world.engine.release(parked.request_id)
    assert not world.engine.idle() and len(asked) == 2
