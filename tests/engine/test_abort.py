"""A request may go away at any moment; nothing it held stays behind, and its neighbours do not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import World

from vlcache_dist.engine.api import Compute, Mode, Reuse
from vlcache_dist.errors import EngineError
from vlcache_dist.types import FinishReason, ObjectKind


def busy_world() -> World:
    world = World(1, max_batch_tokens=11, max_running=3)
    world.picture("a", (1, 8, 8))
    world.picture("b", (1, 4, 8))
    world.picture("c", (1, 4, 4))
    world.ask([4, "c", 2])
    return world


STEPS = 14


@pytest.mark.parametrize("mode", [Mode.GENERATE, Mode.PREFILL])
@pytest.mark.parametrize("stage", range(STEPS + 3))
def test_abort_at_every_step(stage: int, mode: Mode) -> None:
    world = busy_world()
    text = world.text(6)
    victim = world.generation([text, "c", 2, "a", 2, "b", 4], max_tokens=5, request_id="victim", plan="full")
    other = world.generation([7, "b", 4], max_tokens=4, reuse="exact")
    expected = busy_world().run(other)[0]
    world.add(victim, mode)
    world.add(other)
    for _ in range(stage):
        world.resolve()
        world.step()
        world.engine.validate()
    here = world.engine.abort("victim")
    assert here == (not world.results["victim"].finish)
    world.engine.validate()
    world.results["victim"].unresolved = []
    world.drive()
    result = world.results[other.request_id]
    assert result.tokens == expected.tokens
    for got, want in zip(result.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    recorded, dropped = world.results["victim"].recorded, world.results["victim"].dropped
    assert len({event.span_index for event in (*recorded, *dropped)}) == len(recorded) + len(dropped)
    world.assert_idle()


def test_the_stages_cover_the_whole_life() -> None:
    """The test above aborts before admission, in every chunk, while decoding, parked and after the end."""
    for mode, last in ((Mode.GENERATE, True), (Mode.PREFILL, False)):
        world = busy_world()
        generation = world.generation([6, "c", 2, "a", 2, "b", 4], max_tokens=5, plan="full")
        world.add(generation, mode)
        for _ in range(STEPS):
            world.resolve()
            world.step()
        result = world.results[generation.request_id]
        assert len(result.tokens) == (5 if last else 1)
        assert (result.finish is FinishReason.LENGTH) == last


def test_abort_drops_the_record_and_somebody_else_can_make_it() -> None:
    world = World(2, max_batch_tokens=10)
    world.picture("a", (1, 12, 12))
    victim = world.generation([4, "a", 2])
    world.add(victim)
    for _ in range(3):
        world.resolve()
        world.step()
    waiting = world.generation([5, "a", 2])
    world.add(waiting)
    world.step()
    world.resolve()
    assert world.results[waiting.request_id].unresolved == [0]  # it waits for the victim's record
    world.engine.abort(victim.request_id)
    assert world.engine.has_work()  # the event must be told
    world.drive()
    assert [event.key for event in world.results[victim.request_id].dropped] == [world.key("a")]
    assert world.results[waiting.request_id].recorded
    world.assert_idle()


def test_sources_for_a_request_that_is_gone_are_given_back() -> None:
    world = World(3)
    world.picture("a")
    world.ask([4, "a", 2])
    span = world.generation([5, "a", 2]).spans[0]
    kv = world.store.lookup(ObjectKind.KV, span.key, pin=True)
    assert kv is not None
    world.engine.provide("gone", 0, world.reuse(span, kv, "uniform:20"))
    world.picture("b")
    other = world.generation([5, "b", 2]).spans[0]
    world.engine.provide("gone", 0, Compute(world.embedding(other), world.begin_record(other)))
    world.drive()
    assert [event.key for event in world.results["gone"].dropped] == [world.key("b")]
    world.assert_idle()


def test_sources_given_before_admission() -> None:
    """They are used after it, or given back if the request goes away or finds its spans in the prefix cache."""
    world = World(4, max_running=1, max_batch_tokens=300)
    world.picture("a")
    text = world.text(8)
    running = world.generation([text, "a", 3], max_tokens=6, reuse="exact")
    world.add(running)
    world.drive_some(2)
    queued = [
        world.generation([text, "a", 12], reuse="exact"),
        world.generation([3, "a", 2]),
        world.generation([5, "a", 2]),
    ]
    for generation in queued:
        world.add(generation)
        source = Compute(world.embedding(generation.spans[0]))
        world.engine.provide(generation.request_id, 0, source)
        with pytest.raises(ValueError, match="already"):
            world.engine.provide(generation.request_id, 0, source)
    world.engine.validate()
    world.engine.abort(queued[1].request_id)
    world.drive()
    for generation in (queued[0], queued[2]):
        assert world.results[generation.request_id].finish is FinishReason.LENGTH
        assert world.results[generation.request_id].admitted.needed == ()
    world.assert_idle()


def test_sources_that_do_not_fit_are_refused_and_not_taken() -> None:
    world = World(5)
    world.picture("a", (1, 8, 8))
    world.picture("b", (1, 4, 4))
    world.ask([4, "a", 2])
    world.ask([4, "b", 2])
    exact = world.generation([5, "a", 2], reuse="exact")
    approx = world.generation([5, "a", 2])
    for generation in (exact, approx):
        world.add(generation)
    world.step()
    span, small = approx.spans[0], world.generation([1, "b", 1]).spans[0]
    kv = world.store.lookup(ObjectKind.KV, span.key, pin=True)
    other = world.store.lookup(ObjectKind.KV, small.key, pin=True)
    good = world.reuse(span, kv, "uniform:20")
    short = world.embedding(small)
    one_more = np.zeros_like(good.depths)
    one_more[len(world.embeddings[small.key])] = 1  # a token past those that ``short`` has, in one layer
    bad = [
        (exact, good, "takes no image KV"),
        (approx, Reuse(other, good.depths, good.embedding), "another one's"),
        (approx, Reuse(kv, good.depths[:-1], good.embedding), "do not fit"),
        (approx, Reuse(kv, good.depths + 5, good.embedding), "do not fit"),
        (approx, Reuse(kv, good.depths), "encoder output"),
        (approx, Compute(short), "encoder output"),
        (approx, Reuse(kv, one_more, short), "encoder output"),
    ]
    for generation, source, message in bad:
        with pytest.raises(ValueError, match=message):
            world.engine.provide(generation.request_id, 0, source)
    few = Reuse(kv, good.depths, short)  # as many rows as the plan recomputes are enough
    world.engine.provide(approx.request_id, 0, few)
    world.store.unpin(good.embedding)
    world.store.discard(good.embedding)
    world.store.unpin(other)
    world.results[approx.request_id].unresolved = []
    world.drive()
    world.assert_idle()


def test_a_failed_pass_fails_its_requests_only() -> None:
    world = World(6)
    world.picture("a")
    launch = world.engine.runner.launch
    world.engine.runner.launch = lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory"))
    generation = world.generation([4, "a", 2])
    world.add(generation)
    world.drive()
    result = world.results[generation.request_id]
    assert result.failed is not None
    assert "out of memory" in str(result.failed.error)
    world.engine.runner.launch = launch
    assert world.ask([4, "a", 2]).finish is FinishReason.LENGTH
    world.assert_idle()


def test_a_device_that_keeps_failing_stops_the_engine() -> None:
    world = World(7)
    world.engine.runner.launch = lambda *args: (_ for _ in ()).throw(RuntimeError("device lost"))
    with pytest.raises(EngineError, match="device lost"):
        for _ in range(10):
            world.ask([4])
