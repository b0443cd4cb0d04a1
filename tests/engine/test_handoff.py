"""Prefill to decode: the decode side's pages equal the prefill side's bit for bit, with as little moved as possible."""

from __future__ import annotations

import pytest
import torch
from engine_cases import World

from vlcache_dist.engine.api import Export, Import, Mode
from vlcache_dist.errors import StoreFull
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.types import FinishReason, ObjectKind
from vlcache_dist.wire import Generation


def pair(**options: object) -> tuple[World, World]:
    worlds = World(1, **options), World(1, num_blocks=300, block_size=8)  # type: ignore[arg-type]
    for world in worlds:
        for name, grid in {"a": (1, 8, 8), "b": (1, 4, 8), "v": (2, 4, 4)}.items():
            world.picture(name, grid)
    return worlds


def ship(source: World, target: World, extent: Extent, destination: Extent) -> None:
    """A READ."""
    target.arena.tensor[destination.offset : destination.offset + extent.elements] = source.arena.tensor[
        extent.offset : extent.offset + extent.elements
    ]


def move(source: World, target: World, export: Export, generation: Generation) -> tuple[Import, int]:
    """Fetch what the target does not have; returns the import and the number of objects that moved."""
    objects, moved = {}, 0
    for span in export.spans:
        have = target.store.lookup(ObjectKind.KV, span.key, span.variant, pin=True)
        if have is None:
            remote = source.store.lookup(ObjectKind.KV, span.key, span.variant)
            assert remote is not None, "a derivable span's object must stay where it is until release"
            have = target.store.begin(ObjectKind.KV, span.key, span.variant, remote.elements, 0.0)
            ship(source, target, remote, have)
            have = target.store.commit(have, pin=True)
            moved += 1
        objects[span.index] = have
    staging = None
    if export.staging is not None:
        staging = target.store.stage(export.staging.elements, 0.0)
        ship(source, target, export.staging, staging)
    return Import(export.num_tokens, export.rows, objects, staging), moved


def hand_over(source: World, target: World, generation: Generation) -> tuple[Export, int]:
    """Prefill at the source, decode to the end at the target; checks pages on the way."""
    (first,) = source.run(generation, mode=Mode.PREFILL)
    export = source.engine.export(generation.request_id, source.now)
    assert source.engine.export(generation.request_id, source.now) == export
    target.add(generation, Mode.DECODE)
    target.step()
    assert target.results[generation.request_id].admitted.needed == ()
    assert not target.engine.has_work()
    kv, moved = move(source, target, export, generation)
    target.engine.import_sequence(generation.request_id, first.tokens[0], kv)
    for ours, theirs in zip(source.kv_of(generation.request_id), target.kv_of(generation.request_id), strict=True):
        assert torch.equal(ours, theirs)
    assert source.engine.release(generation.request_id)
    assert not source.engine.release(generation.request_id)
    target.drive()
    source.assert_idle_but_objects()
    target.assert_idle_but_objects()
    return export, moved


def shipped(export: Export) -> set[int]:
    return {position for start, stop in export.rows for position in range(start, stop)}


def test_fresh_picture_travels_as_object_and_then_never_again() -> None:
    source, target = pair()
    text = source.text(6)
    for turn, expected in ((0, 1), (1, 0)):
        generation = source.generation([text[turn:], "a", text], max_tokens=5)
        alone = World(1)
        alone.picture("a", (1, 8, 8))
        reference = alone.run(*([generation] if turn == 0 else [source.generation([text, "a", text]), generation]))[-1]
        export, moved = hand_over(source, target, generation)
        assert moved == expected
        span = generation.spans[0]
        if turn == 0:
            assert shipped(export) == set(range(len(generation.token_ids))) - set(range(span.start, span.end))
        result = target.results[generation.request_id]
        assert result.tokens == reference.tokens[1:]
        assert result.finish is FinishReason.LENGTH


@pytest.mark.parametrize("plan", ["none", "uniform:30", "pyramid:60-10", "full"])
def test_recomputed_rows_travel(plan: str) -> None:
    source, target = pair()
    source.ask([4, "a", 2])
    source.ask([4, "v", 2])
    generation = source.generation([7, "a", 2, "v", 1, "b", 3], plan=plan, max_tokens=6)
    export, _ = hand_over(source, target, generation)
    rows = shipped(export)
    a, _, b = generation.spans
    recomputed = {"none": 0, "uniform:30": 5, "pyramid:60-10": 10, "full": 16}[plan]
    assert rows & set(range(a.start, a.end)) == set(range(a.start, a.start + recomputed))
    # The picture after approximated KV was not recorded: its rows travel.
    assert (set(range(b.start, b.end)) <= rows) == (plan != "full")
    # With a full plan both reused pictures were computed afresh, and the third is a legal donor.
    assert [span.index for span in export.spans] == ([2] if plan == "full" else [0, 1])
    assert all(export.rows[i][1] < export.rows[i + 1][0] for i in range(len(export.rows) - 1))


def test_rows_that_a_second_pass_corrected_travel() -> None:
    """No object has them: the decode side must not rebuild them from the one they were reused from."""
    source, target = pair()
    source.ask([4, "a", 2])
    source.ask([4, "b", 2])
    plan = "none+canary:0,2,1<0.000001,again:20@1<900"
    generation = source.generation([7, "a", 2, "b", 3], plan=plan, max_tokens=6)
    export, moved = hand_over(source, target, generation)
    assert [report.why for report in source.results[generation.request_id].done.reports] == ["rechecked"] * 2  # type: ignore[union-attr]
    assert shipped(export) == set(range(len(generation.token_ids))) and not moved


def test_a_prefix_hit_still_knows_its_objects() -> None:
    """Turn 2 starts with turn 1's blocks; its picture's rows are still derivable and do not travel."""
    source, target = pair()
    text = source.text(9)
    first = source.generation([text, "a", text], max_tokens=4)
    hand_over(source, target, first)
    second = source.generation([text, "a", text, 12], max_tokens=4)
    export, moved = hand_over(source, target, second)
    assert source.results[second.request_id].admitted.cached_tokens >= second.spans[0].end
    assert moved == 0
    span = second.spans[0]
    assert not shipped(export) & set(range(span.start, span.end))


@pytest.mark.parametrize("another_variant", [False, True])
def test_an_evicted_object_makes_its_rows_travel(another_variant: bool) -> None:
    source, target = pair()
    text = source.text(9)
    source.ask([text, "a", text])
    source.store.clear()
    if another_variant:
        record = source.begin_record(source.generation(["a", 1]).spans[0])
        source.store.commit(record)
    generation = source.generation([text, "a", text, 5], max_tokens=4)
    export, _ = hand_over(source, target, generation)
    assert export.spans == ()
    assert shipped(export) == set(range(len(generation.token_ids)))


def test_blocks_forget_what_they_were_copied_from() -> None:
    """A picture is computed in blocks that held its recorded KV before: its rows are no longer the object's."""
    source, target = pair(num_blocks=8)
    first = source.generation([6, "a", 3], max_tokens=2)
    source.run(first, mode=Mode.PREFILL)
    blocks = set(source.engine._sequences[first.request_id].blocks)
    source.engine.release(first.request_id)
    source.engine.pool.drop_contents()
    second = source.generation([6, "a", 3], plan="full", max_tokens=2)
    export, _ = hand_over(source, target, second)
    assert len(blocks) * 2 > 8  # so that some of them are used again
    assert export.spans == ()


def test_objects_of_a_parked_request_cannot_be_evicted() -> None:
    source, _ = pair()
    generation = source.generation([4, "a", 2], max_tokens=3)
    source.run(generation, mode=Mode.PREFILL)
    assert source.store.stats().pinned > 0
    source.engine.export(generation.request_id, 0.0)
    source.engine.release(generation.request_id)
    source.assert_idle()


def test_no_room_for_staging_leaves_the_request_parked() -> None:
    source, _ = pair()
    generation = source.generation([40, "a", 2], max_tokens=3)
    source.run(generation, mode=Mode.PREFILL)
    free = source.store.stats().largest_free
    hog = source.store.stage(free - source.layout.kv_elements(4), 0.0)
    with pytest.raises(StoreFull):
        source.engine.export(generation.request_id, 0.0)
    source.engine.validate()
    source.store.abort(hog)
    assert source.engine.export(generation.request_id, 0.0).staging is not None
    assert source.engine.abort(generation.request_id)
    source.assert_idle()


def test_imports_that_do_not_fit_are_refused_and_not_taken() -> None:
    source, target = pair()
    generation = source.generation([6, "a", 3], max_tokens=3)
    source.run(generation, mode=Mode.PREFILL)
    export = source.engine.export(generation.request_id, 0.0)
    target.add(generation, Mode.DECODE)
    kv, _ = move(source, target, export, generation)
    with pytest.raises(ValueError, match="does not wait"):
        target.engine.import_sequence(generation.request_id, 1, kv)
    target.step()
    with pytest.raises(ValueError, match="import_sequence"):
        target.engine.provide(generation.request_id, 0, target.source(generation.request_id, 0))
    bad = [
        (Import(kv.num_tokens - 1, kv.rows, kv.objects, kv.staging), "positions for a prompt"),
        (Import(kv.num_tokens, kv.rows, {}, kv.staging), "neither shipped nor derivable"),
        (Import(kv.num_tokens, kv.rows[1:], kv.objects, kv.staging), "neither shipped nor derivable"),
        (Import(kv.num_tokens, kv.rows[::-1], kv.objects, kv.staging), "out of order"),
        (Import(kv.num_tokens, kv.rows, kv.objects, None), "do not fill"),
        (Import(kv.num_tokens, ((0, kv.num_tokens),), kv.objects, kv.staging), "do not fill"),
        (Import(kv.num_tokens, kv.rows, {1: kv.objects[0]}, kv.staging), "span 1 of 1"),
        (Import(kv.num_tokens, kv.rows, {0: kv.staging}, kv.staging), "do not fit"),
    ]
    for wrong, message in bad:
        with pytest.raises(ValueError, match=message):
            target.engine.import_sequence(generation.request_id, 1, wrong)
    target.engine.import_sequence(generation.request_id, 1, kv)
    with pytest.raises(ValueError, match="does not wait"):
        target.engine.import_sequence(generation.request_id, 1, kv)
    target.drive()
    assert len(target.results[generation.request_id].tokens) == 2


def test_an_import_for_a_request_that_is_gone_is_given_back() -> None:
    source, target = pair()
    generation = source.generation([6, "a", 3], max_tokens=3)
    source.run(generation, mode=Mode.PREFILL)
    kv, _ = move(source, target, source.engine.export(generation.request_id, 0.0), generation)
    target.add(generation, Mode.DECODE)
    target.step()
    target.engine.abort(generation.request_id)
    target.engine.import_sequence(generation.request_id, 1, kv)
    target.assert_idle()
    source.engine.release(generation.request_id)
    source.assert_idle()


def test_only_parked_requests_are_exported() -> None:
    source, _ = pair()
    generation = source.generation([6, "a", 3], max_tokens=3)
    source.add(generation)
    with pytest.raises(ValueError, match="not parked"):
        source.engine.export(generation.request_id, 0.0)
    assert not source.engine.release(generation.request_id)
    source.drive()
    source.assert_idle()


def test_a_first_token_that_ends_the_answer_is_not_parked() -> None:
    source, _ = pair()
    result = source.ask([6, "a", 3], max_tokens=1, mode=Mode.PREFILL)
    assert result.finish is FinishReason.LENGTH
    source.assert_idle()
