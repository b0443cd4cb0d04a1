"""What is recorded, what is not, and that what was recorded stays what it was."""

from __future__ import annotations

import pytest
import torch
from engine_cases import World

from vlcache_dist.engine.api import Compute, Mode, RecordDropped, SpanRecorded
from vlcache_dist.kernels import rotate
from vlcache_dist.types import KVSource, ObjectKind


def pages_from_object(world: World, name: str, request_id: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pages of a span must hold if they equal the stored object, rotated: K and V [layer, token, ...]."""
    sequence = world.engine._sequences[request_id]
    span = sequence.generation.spans[index]
    stored = world.object_of(name)
    cos, sin = world.model.rope(torch.from_numpy(sequence.positions[:, span.start : span.end].copy()))
    k = torch.stack([rotate(layer[0], cos, sin) for layer in stored])
    return k, stored[:, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hit_at_the_same_positions_writes_the_same_bits(dtype: str) -> None:
    world = World(1, dtype=dtype)
    world.picture("a", (1, 8, 8))
    first = world.generation([6, "a", 3], max_tokens=2)
    second = world.generation([6, "a", 3], max_tokens=2, plan="none")
    world.run(first, mode=Mode.PREFILL)
    span = first.spans[0]
    k, v = world.kv_of(first.request_id)
    (result,) = world.run(second, mode=Mode.PREFILL)
    again_k, again_v = world.kv_of(second.request_id)
    assert result.done is not None
    assert result.done.reports[0].source is KVSource.LOCAL
    assert torch.equal(k[:, span.start : span.end], again_k[:, span.start : span.end])
    assert torch.equal(v[:, span.start : span.end], again_v[:, span.start : span.end])
    assert not torch.equal(k[1:, : span.start], again_k[1:, : span.start])


@pytest.mark.parametrize("max_batch_tokens", [9, 12, 23, 512])
def test_recorded_across_chunks(max_batch_tokens: int) -> None:
    world = World(2, max_batch_tokens=max_batch_tokens)
    world.picture("a", (1, 8, 8))
    world.picture("b", (1, 4, 8))
    generation = world.generation([5, "a", 2, "b", 3], max_tokens=2)
    (result,) = world.run(generation, mode=Mode.PREFILL)
    assert [event.span_index for event in result.recorded] == [0, 1]
    assert not result.dropped
    k, v = world.kv_of(generation.request_id)
    for index, name in enumerate(("a", "b")):
        span = generation.spans[index]
        stored_k, stored_v = pages_from_object(world, name, generation.request_id, index)
        assert torch.equal(k[:, span.start : span.end], stored_k)
        assert torch.equal(v[:, span.start : span.end], stored_v)


def test_announced_only_when_every_token_is_written() -> None:
    world = World(3, max_batch_tokens=10)
    world.picture("a", (1, 8, 8))
    generation = world.generation([5, "a", 3])
    world.add(generation)
    seen = []
    while not world.results[generation.request_id].finish:
        world.resolve()
        events = world.step()
        sequence = world.engine._sequences.get(generation.request_id)
        complete = sequence is None or sequence.num_computed >= generation.spans[0].end
        seen += [event for event in events if isinstance(event, SpanRecorded)]
        assert bool(seen) == complete
        assert (world.store.lookup(ObjectKind.KV, world.key("a")) is not None) == complete
    assert len(seen) == 1


def test_exact_requests_record_and_off_requests_do_not() -> None:
    world = World(4)
    world.picture("a")
    assert not world.ask([3, "a", 3], reuse="off").recorded
    assert world.store.stats().num_objects == 0
    assert world.ask([3, "a", 3], reuse="exact").recorded
    assert world.ask([4, "a", 3], reuse="approx").done.reports[0].source is KVSource.LOCAL
    before = world.store.stats().num_objects
    assert world.ask([4, "a", 3], reuse="off").done.reports[0].source is KVSource.COMPUTED
    assert world.store.stats().num_objects == before
    world.assert_idle()


def test_off_takes_no_record() -> None:
    world = World(5)
    world.picture("a")
    generation = world.generation([3, "a", 3], reuse="off")
    world.add(generation)
    world.step()
    record = world.begin_record(generation.spans[0])
    embedding = world.embedding(generation.spans[0])
    with pytest.raises(ValueError, match="records nothing"):
        world.engine.provide(generation.request_id, 0, Compute(embedding, record))
    world.engine.provide(generation.request_id, 0, Compute(embedding))
    world.store.abort(record)
    world.results[generation.request_id].unresolved = []
    world.drive()
    world.assert_idle()


def test_picture_after_approximated_kv_is_no_donor() -> None:
    world = World(6)
    for name in "ab":
        world.picture(name)
    world.ask([5, "a", 2])
    result = world.ask([4, "a", 2, "b", 2], plan="uniform:30")
    assert not result.recorded
    assert result.done.reports[1].source is KVSource.COMPUTED
    assert world.store.lookup(ObjectKind.KV, world.key("b")) is None
    assert world.ask([4, "b", 2]).recorded  # it was not spoilt for good
    world.assert_idle()


def test_picture_before_approximated_kv_is_a_donor() -> None:
    world = World(7)
    for name in "ab":
        world.picture(name)
    world.ask([5, "a", 2])
    result = world.ask([4, "b", 2, "a", 2])
    assert [event.span_index for event in result.recorded] == [0]
    world.assert_idle()


def test_full_plan_does_not_taint() -> None:
    world = World(8)
    for name in "ab":
        world.picture(name)
    world.ask([5, "a", 2])
    assert world.ask([4, "a", 2, "b", 2], plan="full").recorded
    world.assert_idle()


def test_a_record_given_too_early_is_dropped_when_taint_appears_before_it() -> None:
    world = World(9)
    for name in "ab":
        world.picture(name)
    world.ask([5, "a", 2])
    generation = world.generation([4, "a", 2, "b", 2])
    world.add(generation)
    world.step()
    assert world.engine.recordable(generation.request_id, 1)
    late = generation.spans[1]
    world.engine.provide(generation.request_id, 1, Compute(world.embedding(late), world.begin_record(late)))
    source = world.source(generation.request_id, 0)
    assert source is not None
    world.engine.provide(generation.request_id, 0, source)
    assert not world.engine.recordable(generation.request_id, 1)
    world.results[generation.request_id].unresolved = []
    world.drive()
    result = world.results[generation.request_id]
    assert result.dropped == [RecordDropped(generation.request_id, 1, world.key("b"))]
    assert not result.recorded
    assert world.store.lookup(ObjectKind.KV, world.key("b")) is None
    world.assert_idle()


@pytest.mark.parametrize("plan", ["none", "uniform:20", "full"])
def test_a_picture_that_recurs_in_its_prompt(plan: str) -> None:
    """The first occurrence records; the second waits for it and reuses the object."""
    world = World(10)
    world.picture("a")
    generation = world.generation([5, "a", 4, "a", 3], plan=plan, max_tokens=2)
    (result,) = world.run(generation, mode=Mode.PREFILL)
    assert [event.span_index for event in result.recorded] == [0]
    first, second = result.done.reports
    assert first.source is KVSource.COMPUTED
    assert second.source is KVSource.LOCAL
    assert second.recomputed_tokens == {"none": 0, "uniform:20": 4, "full": 16}[plan]
    k, v = world.kv_of(generation.request_id)
    a, b = generation.spans
    stored_k, stored_v = pages_from_object(world, "a", generation.request_id, 1)
    kept = {"none": 0, "uniform:20": 4, "full": 16}[plan]
    assert torch.equal(k[:, b.start + kept : b.end], stored_k[:, kept:])
    assert torch.equal(v[:, b.start + kept : b.end], stored_v[:, kept:])
    assert torch.equal(v[:, a.start : a.end], stored_v)
    world.engine.release(generation.request_id)
    world.assert_idle()


def test_a_second_occurrence_is_not_recorded_twice() -> None:
    world = World(11)
    world.picture("a")
    generation = world.generation([5, "a", 4, "a", 3], reuse="exact")
    world.add(generation)
    world.step()
    for index in (0, 1):
        span = generation.spans[index]
        assert world.engine.recordable(generation.request_id, index) == (index == 0)
        world.engine.provide(generation.request_id, index, Compute(world.embedding(span), world.begin_record(span)))
    world.results[generation.request_id].unresolved = []
    world.drive()
    result = world.results[generation.request_id]
    assert [event.span_index for event in result.recorded] == [0]
    assert [event.span_index for event in result.dropped] == [1]
    assert world.store.stats().num_objects == 1
    world.assert_idle()


@pytest.mark.parametrize("plan", ["none", "uniform:30", "full"])
def test_recomputed_rows_leave_the_object_alone(plan: str) -> None:
    world = World(12)
    world.picture("a", (1, 8, 8))
    world.ask([5, "a", 2])
    stored, kept = world.object_of("a"), world.object_of("a").clone()
    variant = world.store.lookup(ObjectKind.KV, world.key("a")).variant
    world.ask([9, "a", 2], plan=plan)
    assert torch.equal(stored, kept)
    assert world.store.lookup(ObjectKind.KV, world.key("a")).variant == variant


def test_all_readers_at_once_share_one_record() -> None:
    """Ten first requests for one picture: one computes and records, nine reuse what it recorded."""
    world = World(13, max_running=12)
    world.picture("a")
    results = world.run(*(world.generation([4 + i, "a", 3]) for i in range(10)))
    assert sum(len(result.recorded) for result in results) == 1
    sources = [result.done.reports[0].source for result in results]
    assert sources.count(KVSource.COMPUTED) == 1
    assert sources.count(KVSource.LOCAL) == 9
    world.assert_idle()
