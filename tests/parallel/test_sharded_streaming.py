"""A streamed pass on two ranks: group by group on both, other requests between the groups, and withdrawn on both."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from sharded_world import CONFIG, Sharded, World, sharded_world

from vlcache_dist.engine.engine import new_variant
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.types import ObjectKind

GROUPS = (0, 1, 2, 4)
PROMPT = [(1, 2, 3), "a", (4, 5)]


def arriving(sharded: Sharded) -> tuple[str, Extent, Extent]:
    """A request whose source is on its way: (request, what arrives, what it is copied from)."""
    world = sharded.world
    generation = world.generation(PROMPT, max_tokens=4)
    result = world.add(generation)
    world.step()
    assert result.unresolved == [0]
    result.unresolved = []
    span = generation.spans[0]
    there = world.store.lookup(ObjectKind.KV, span.key)
    assert there is not None
    extent = world.store.begin(ObjectKind.KV, span.key, new_variant(), there.elements, world.now, transfer=True)
    for arena in sharded.arenas.values():
        arena.kv_view(extent, span.length).fill_(float("nan"))
    source = replace(world.reuse(span, extent, generation.plan), groups=GROUPS)
    world.engine.provide(generation.request_id, 0, source)
    return generation.request_id, extent, there


def land(sharded: Sharded, request_id: str, extent: Extent, there: Extent, start: int, stop: int) -> None:
    for arena in sharded.arenas.values():
        arena.kv_view(extent, 16)[start:stop] = arena.kv_view(there, 16)[start:stop]
    sharded.world.engine.arrived(request_id, 0, stop)


def expected() -> World:
    alone = World(config=CONFIG)
    alone.picture("a")
    alone.ask([3, "a", 5])
    alone.ask(PROMPT, max_tokens=4, request_id="expected")
    return alone


def test_groups_are_computed_on_both_ranks_as_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = expected()
    with sharded_world(2, monkeypatch) as sharded:
        world = sharded.world
        world.picture("a")
        world.ask([3, "a", 5])
        request_id, extent, there = arriving(sharded)
        other = world.generation([7, "a", 9], max_tokens=8)
        world.add(other)
        for start, stop in pairwise(GROUPS):
            land(sharded, request_id, extent, there, start, stop)
            world.resolve()
            world.step()
        assert not world.results[request_id].tokens
        world.engine.admit(request_id, 0, world.store.commit(extent, pin=True))
        world.drive()
        assert world.engine.stats().spans_streamed == 1
        ours, theirs = world.results[request_id], alone.results["expected"]
        assert ours.tokens == theirs.tokens
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert len(world.results[other.request_id].tokens) == 8
        world.assert_idle()


def test_what_is_withdrawn_is_erased_on_both_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = expected()
    with sharded_world(2, monkeypatch) as sharded:
        world = sharded.world
        world.picture("a")
        world.ask([3, "a", 5])
        request_id, extent, there = arriving(sharded)
        land(sharded, request_id, extent, there, 0, 2)
        sharded.arenas[1].kv_view(extent, 16)[1] = float("nan")
        world.step()
        world.engine.revoke(request_id, 0)
        world.store.abort(extent)
        world.engine.runner.synchronize()
        sequence = world.engine._sequences[request_id]
        for pages in sharded.pages.values():
            assert not pages.flatten(2, 3)[:, :, sequence.slots(0, sequence.num_prompt)].isnan().any()
        kv = world.store.lookup(ObjectKind.KV, world.key("a"), pin=True)
        assert kv is not None
        span = world.generations[request_id].spans[0]
        world.engine.provide(request_id, 0, world.reuse(span, kv, world.generations[request_id].plan))
        world.drive()
        assert world.results[request_id].tokens == alone.results["expected"].tokens
        world.assert_idle()
