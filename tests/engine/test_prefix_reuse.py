"""Prefix caches seen from the engine: who may hit what, and what a next turn costs."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Part, Result, World

from vlcache_dist.engine.api import Mode
from vlcache_dist.types import KVSource

BLOCK = 4


def next_turn(world: World, parts: list[Part], result: Result, question: int = 7) -> list[Part]:
    """The conversation so far, its answer, and a new question."""
    return [*parts, tuple(result.tokens), world.text(question)]


@pytest.mark.parametrize("reuse", ["exact", "approx"])
@pytest.mark.parametrize("warm", [False, True])
def test_the_next_turn_computes_only_new_tokens(reuse: str, warm: bool) -> None:
    world = World(1, block_size=BLOCK)
    for name in "ab":
        world.picture(name)
    if warm:
        world.ask([5, "a", 2])
    text = world.text(9)
    parts: list[Part] = [text, "a", text, "b", text]
    for _ in range(3):
        generation = world.generation(parts, reuse=reuse, max_tokens=6)
        before = world.engine.stats().layer_rows[0]
        (result,) = world.run(generation)
        computed = world.engine.stats().layer_rows[0] - before - (len(result.tokens) - 1)
        total = len(generation.token_ids)
        if len(parts) > 5:
            known = total - 7 - 1  # the last answer token was never computed
            assert result.admitted.cached_tokens == known // BLOCK * BLOCK
            assert computed == total - result.admitted.cached_tokens
            assert result.admitted.needed == ()
            assert [report.source for report in result.done.reports] == [KVSource.PREFIX] * 2
            assert result.done.cached_tokens == result.admitted.cached_tokens
        parts = next_turn(world, parts, result)
    world.assert_idle()


def test_exact_never_hits_tainted_blocks() -> None:
    world = World(2, block_size=BLOCK)
    world.picture("a")
    world.ask([5, "a", 2])
    text = world.text(8)
    parts: list[Part] = [text, "a", text]
    tainted = world.ask(parts, plan="none", max_tokens=9)
    again: list[Part] = [*parts, tuple(tainted.tokens), 5]
    exact = world.ask(again, reuse="exact")
    assert exact.admitted.cached_tokens <= len(text)
    off = world.ask([*parts, tuple(tainted.tokens), tuple(world.generations[_last(world)].token_ids[-5:])], reuse="off")
    torch.testing.assert_close(exact.logprobs[0], off.logprobs[0], atol=1e-4, rtol=1e-4)


def _last(world: World) -> str:
    return list(world.generations)[-1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_are_tainted_from_the_first_reused_picture_on(order: tuple[int, int]) -> None:
    """Whichever of two sources comes first."""
    world = World(3, block_size=BLOCK)
    for name in "ab":
        world.picture(name)
    world.ask([5, "a", 2])
    world.ask([5, "b", 2])
    text = world.text(8)
    parts: list[Part] = [text, "a", text, "b", text]
    generation = world.generation(parts, plan="none", max_tokens=2)
    world.add(generation)
    world.step()
    for index in order:
        source = world.source(generation.request_id, index)
        assert source is not None
        world.engine.provide(generation.request_id, index, source)
    world.results[generation.request_id].unresolved = []
    world.drive()
    exact = world.ask([*parts, 5], reuse="exact")
    assert exact.admitted.cached_tokens == len(text)
    off = world.ask([*parts, tuple(world.generations[_last(world)].token_ids[-5:])], reuse="off")
    torch.testing.assert_close(exact.logprobs[0], off.logprobs[0], atol=1e-4, rtol=1e-4)
    world.assert_idle()


def test_approx_hits_both_kinds_and_stays_tainted() -> None:
    world = World(3, block_size=BLOCK)
    for name in "abc":
        world.picture(name)
    world.ask([5, "b", 2])
    text = world.text(12)
    parts: list[Part] = [text, "a", text, "b", text]
    first = world.ask(parts, max_tokens=4)
    assert [e.span_index for e in first.recorded] == [0]
    second = world.ask([*parts, tuple(first.tokens), 6, "c", 3])
    assert second.admitted.needed == (2,)
    assert not second.recorded  # it stands on tainted blocks
    assert world.engine.stats().approx_hit_tokens > 0
    assert world.engine.stats().exact_hit_tokens > 0
    world.assert_idle()


@pytest.mark.parametrize("plan", ["none", "full"])
def test_blocks_are_named_by_the_variant_that_is_reused(plan: str) -> None:
    world = World(10, block_size=BLOCK)
    world.picture("a")
    (recorded,) = world.ask([5, "a", 2]).recorded
    generation = world.generation([6, "a", 3, "a", 2], plan=plan, max_tokens=2)
    world.run(generation, mode=Mode.PREFILL)
    chain = world.engine._sequences[generation.request_id].chain
    reused = None if plan == "full" else recorded.extent.variant
    assert chain.variants == (reused, reused)


def test_another_plan_does_not_hit_tainted_blocks() -> None:
    world = World(4, block_size=BLOCK)
    world.picture("a")
    world.ask([5, "a", 2])
    text = world.text(8)
    world.ask([text, "a", text], plan="none")
    assert world.ask([text, "a", text], plan="uniform:30").admitted.cached_tokens == 8
    assert world.ask([text, "a", text], plan="none").admitted.cached_tokens > 8


def test_off_neither_hits_nor_fills() -> None:
    world = World(5, block_size=BLOCK)
    text = world.text(20)
    world.ask([text], reuse="off")
    assert world.ask([text], reuse="exact").admitted.cached_tokens == 0
    assert world.ask([text], reuse="off").admitted.cached_tokens == 0
    assert world.ask([text], reuse="exact").admitted.cached_tokens == 16


def test_tenants_share_no_prefix() -> None:
    world = World(6, block_size=BLOCK)
    text = world.text(20)
    world.ask([text], tenant="x")
    assert world.ask([text], tenant="y").admitted.cached_tokens == 0
    assert world.ask([text], tenant="x").admitted.cached_tokens == 16


def test_an_exact_hit_may_end_inside_a_recorded_picture() -> None:
    """Another question about the same picture: the blocks inside the picture are reused, the rest of it is computed,
    and the answer is exact. If its object is gone, the picture is computed as a whole, so that it can be recorded."""
    world = World(7, block_size=16)
    world.picture("a", (1, 16, 16))
    text = world.text(5)
    world.ask([text, "a", 3], reuse="exact")
    question = world.text(6)
    inside = world.ask([text, "a", question], reuse="exact")
    assert inside.admitted.cached_tokens == 64
    assert inside.admitted.needed == (0,)
    assert inside.done.reports[0].source is KVSource.PREFIX
    assert inside.done.reports[0].reused_tokens == 59
    assert not inside.recorded
    off = world.ask([text, "a", question], reuse="off")
    torch.testing.assert_close(inside.logprobs[0], off.logprobs[0], atol=1e-4, rtol=1e-4)
    world.store.clear()
    again = world.ask([text, "a", 4], reuse="exact")
    assert again.admitted.cached_tokens == 0
    assert again.recorded
    world.assert_idle()


def test_blocks_of_an_aborted_prompt_are_right() -> None:
    world = World(8, block_size=BLOCK, max_batch_tokens=9)
    world.picture("a")
    text = world.text(20)
    generation = world.generation([text, "a", 3], reuse="exact")
    world.add(generation)
    world.drive_some(2)
    world.engine.abort(generation.request_id)
    world.step()
    hit = world.ask([text, "a", 3], reuse="exact")
    assert 0 < hit.admitted.cached_tokens <= 20
    off = world.ask([(*world.generations[_last(world)].token_ids[:20],), "a", 3], reuse="off")
    assert off.admitted.cached_tokens == 0
    world.assert_idle()


def test_answers_with_and_without_prefix_hits_agree() -> None:
    world = World(9, block_size=BLOCK)
    world.picture("a")
    text = world.text(11)
    question = world.text(5)
    world.ask([text, "a", text], reuse="exact")
    warm = world.ask([text, "a", text, question], reuse="exact", max_tokens=5)
    cold = world.ask([text, "a", text, question], reuse="off", max_tokens=5)
    assert warm.admitted.cached_tokens > 11
    assert warm.tokens == cold.tokens
    for got, want in zip(warm.logprobs, cold.logprobs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
