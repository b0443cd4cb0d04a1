"""A tensor-parallel engine against the same model in one piece: KV, logits, tokens, records, handoffs, canaries."""

from __future__ import annotations

import msgspec
import pytest
import torch
from sharded_world import CONFIG, World, sharded_world

from vlcache_dist.engine.api import Import, Mode
from vlcache_dist.engine.lazy import Traffic
from vlcache_dist.engine.runner import Runner
from vlcache_dist.engine.warmup import warm_up
from vlcache_dist.types import ObjectKind


@pytest.mark.parametrize("size", [2, 4])
def test_kv_logits_and_tokens_equal_those_of_one_rank(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with sharded_world(size, monkeypatch, max_batch_tokens=48) as sharded:
        alone, world = World(config=CONFIG, max_batch_tokens=48), sharded.world
        for each in (alone, world):
            each.picture("a")
            each.picture("b", (1, 4, 6))
        for parts, plan in (([3, "a", 5], "none"), ([9, "b", 2, "a", 4], "uniform:30"), ([1, "b", 3], "pyramid:50-0")):
            generations = [each.generation(parts, plan=plan, max_tokens=6) for each in (alone, world)]
            for each, generation in zip((alone, world), generations, strict=True):
                each.add(generation)
                while each.results[generation.request_id].done is None:
                    each.resolve()
                    each.step()
            name = generations[0].request_id
            for ours, theirs in zip(sharded.kv_of(name), alone.kv_of(name), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
            for each in (alone, world):
                each.drive()
            assert world.results[name].tokens == alone.results[name].tokens
            for ours, theirs in zip(world.results[name].logprobs, alone.results[name].logprobs, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert world.engine.stats() == alone.engine.stats()
        world.assert_idle()


def test_every_rank_warms_up_for_the_same_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled and graphs planned in a model that sums over the ranks: nobody may be missing."""
    told: list[Traffic] = []
    monkeypatch.setattr(Runner, "expect", lambda self, traffic: told.append(traffic))
    with sharded_world(2, monkeypatch) as sharded:
        warm_up(sharded.world.engine, decodes=False)
        assert not sharded.world.engine.idle()
        sharded.world.engine.runner.synchronize()
        assert len(told) == 2 and told[0] == told[1] and not told[0].decodes
        sharded.world.assert_idle()


def test_what_is_recorded_is_every_ranks_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    with sharded_world(2, monkeypatch) as sharded:
        alone, world = World(config=CONFIG), sharded.world
        for each in (alone, world):
            each.picture("a")
            each.ask([3, "a", 5])
        extent = world.store.lookup(ObjectKind.KV, world.key("a"))
        assert extent is not None
        parts = [sharded.arenas[rank].kv_view(extent, 16) for rank in (0, 1)]
        torch.testing.assert_close(torch.cat(parts, dim=3), alone.object_of("a"), rtol=0, atol=1e-4)


def test_a_handoff_leaves_and_enters_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export packs, import unpacks and scatters: the pages of the second sequence are the first's, on both ranks."""
    with sharded_world(2, monkeypatch) as sharded:
        world = sharded.world
        world.picture("a")
        world.ask([3, "a", 5])
        parts = [7, "a", (4, 5, 6)]
        first = world.generation(parts, plan="uniform:30", max_tokens=4)
        world.add(first, Mode.PREFILL)
        world.drive()
        export = world.engine.export(first.request_id, world.now)
        assert export.staging is not None and len(export.spans) == 1
        before = sharded.kv_of(first.request_id)
        staging = world.store.stage(export.staging.elements, world.now)
        for arena in sharded.arenas.values():
            a, b = staging.offset, export.staging.offset
            arena.tensor[a : a + staging.elements] = arena.tensor[b : b + staging.elements]
        objects = {}
        for span in export.spans:
            objects[span.index] = world.store.lookup(ObjectKind.KV, span.key, span.variant, pin=True)
        second = world.generation(parts, plan="uniform:30", max_tokens=4, request_id="second")
        second = msgspec.structs.replace(second, token_ids=first.token_ids)
        world.add(second, Mode.DECODE)
        world.step()
        token = world.results[first.request_id].tokens[0]
        world.engine.import_sequence("second", token, Import(export.num_tokens, export.rows, objects, staging))  # type: ignore[arg-type]
        for ours, theirs in zip(sharded.kv_of("second"), before, strict=True):
            assert torch.equal(ours, theirs)
        world.engine.release(first.request_id)
        world.drive()
        assert len(world.results["second"].tokens) == 3
        world.assert_idle()


@pytest.mark.parametrize("limit", ["900", "0"], ids=["released", "escalated"])
def test_a_second_pass_runs_on_every_rank(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with sharded_world(2, monkeypatch) as sharded:
        alone, world = World(config=CONFIG), sharded.world
        for each in (alone, world):
            each.picture("a")
            each.ask([3, "a", 5])
        plan = f"none+canary:0,2,1<0.000001,again:20@1<{limit}"
        theirs, ours = (each.ask([11, "a", 5], plan=plan, max_tokens=4) for each in (alone, world))
        assert ours.tokens == theirs.tokens and ours.done is not None and theirs.done is not None
        assert ours.done.reports[0].why == theirs.done.reports[0].why == ("rechecked" if limit == "900" else "canary")
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
        world.assert_idle()


def test_the_canary_looks_at_every_ranks_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    with sharded_world(4, monkeypatch) as sharded:
        alone, world = World(config=CONFIG), sharded.world
        seen = []
        for each in (alone, world):
            each.picture("a")
            each.ask([3, "a", 5])
            generation = each.generation([11, "a", 5], max_tokens=2)
            each.add(generation, Mode.PREFILL)
            each.drive()
            extent = each.store.lookup(ObjectKind.KV, each.key("a"))
            slots = each.engine._sequences[generation.request_id].slots(11, 27)
            probes = torch.arange(0, 16, 3).numpy()
            assert extent is not None
            seen.append(each.engine.runner.compare([(extent.offset, 16)], [probes], slots[probes]))
            each.engine.release(generation.request_id)
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-5)
        assert seen[0][0].max() > 0
