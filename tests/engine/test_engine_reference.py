"""The engine against the deliberately simple reference: pages, first-token distribution, and what was computed."""

from __future__ import annotations

import engine_cases
import pytest
import simple_reference
import torch
from engine_cases import MERGE, Part, World

from vlcache_dist.engine.api import Mode
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.wire import Generation

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def reference(world: World, generation: Generation, reused: dict[int, torch.Tensor]) -> simple_reference.Computed:
    """``reused``: span index -> the donor object [layer, 2, token, kv_head, head_dim]."""
    layers = world.layout.num_layers
    parts: list[tuple[int, tuple[int, int, int] | None]] = []
    embeddings: dict[int, torch.Tensor] = {}
    recompute: dict[int, list[bool]] = {}
    cached: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    cursor = 0
    for index, span in enumerate(generation.spans):
        parts.append((span.start - cursor, None))
        t, h, w = span.grid
        parts.append((span.length, (t, h // MERGE, w // MERGE)))
        cursor = span.end
        counts = Plan.parse(generation.plan).counts(span.length, layers)
        for i in range(span.length):
            embeddings[span.start + i] = world.embeddings[span.key][i]
            if index in reused:
                recompute[span.start + i] = [i < counts[layer] for layer in range(layers)]
                cached[span.start + i] = reused[index][:, 0, i], reused[index][:, 1, i]
    parts.append((len(generation.token_ids) - cursor, None))
    positions = simple_reference.positions_of(parts, tokens_per_second=2 * 0.5)
    return simple_reference.prefill(world.model, list(generation.token_ids), positions, embeddings, recompute, cached)


def donate(world: World, *names: str) -> dict[str, torch.Tensor]:
    """Show every picture once, each behind a text of its own; returns copies of the stored objects."""
    for name in names:
        world.ask([5, name, 3])
    return {name: world.object_of(name).clone() for name in names}


def check(world: World, parts: list[Part], plan: str, donors: dict[str, torch.Tensor]) -> None:
    generation = world.generation(parts, plan=plan, max_tokens=2)
    (result,) = world.run(generation, mode=Mode.PREFILL)
    names = [part for part in parts if isinstance(part, str)]
    reused = {i: donors[name] for i, name in enumerate(names) if name in donors}
    expected = reference(world, generation, reused)
    k, v = world.kv_of(generation.request_id)
    torch.testing.assert_close(k, expected.k_rotated, **TOLERANCE)
    torch.testing.assert_close(v, expected.v, **TOLERANCE)
    torch.testing.assert_close(result.logprobs[0], expected.logprobs, **TOLERANCE)
    world.engine.release(generation.request_id)
    world.assert_idle()


PLANS = ["none", "uniform:5", "uniform:30", "pyramid:80-10", "counts:9,9,4,0", "full"]


@pytest.mark.parametrize("plan", PLANS)
def test_one_reused_picture(plan: str) -> None:
    world = World(1)
    world.picture("a", (1, 8, 6))
    donors = donate(world, "a")
    check(world, [9, "a", 4], plan, donors)


@pytest.mark.parametrize("plan", ["none", "uniform:5", "pyramid:60-20", "full"])
@pytest.mark.parametrize(
    "order", [["a", "F", "b"], ["F", "a", "b"], ["a", "b", "F"], ["b", "a", "G", "F"]], ids=lambda order: "".join(order)
)
def test_reused_and_fresh_pictures_in_any_order(plan: str, order: list[str]) -> None:
    world = World(2)
    for name, grid in {"a": (1, 4, 8), "b": (1, 6, 6), "F": (1, 8, 4), "G": (1, 4, 4)}.items():
        world.picture(name, grid)
    donors = donate(world, "a", "b")
    parts: list[Part] = [3]
    for name in order:
        parts += [name, 2]
    check(world, parts, plan, donors)


@pytest.mark.parametrize("plan", ["none", "uniform:20", "full"])
def test_video(plan: str) -> None:
    world = World(3)
    world.picture("v", (4, 4, 6))
    world.picture("F", (2, 4, 4))
    donors = donate(world, "v")
    check(world, [7, "F", 1, "v", 5], plan, donors)


@pytest.mark.parametrize("max_batch_tokens", [9, 10, 13, 17, 33])
@pytest.mark.parametrize("plan", ["none", "pyramid:60-20"])
def test_chunks_of_any_size(max_batch_tokens: int, plan: str) -> None:
    world = World(4, max_batch_tokens=max_batch_tokens)
    world.picture("a", (1, 6, 8))
    world.picture("F", (1, 8, 8))
    donors = donate(world, "a")
    check(world, [6, "a", 3, "F", 8], plan, donors)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_blocks_of_any_size(block_size: int) -> None:
    world = World(5, block_size=block_size)
    world.picture("a", (1, 6, 8))
    world.picture("F", (1, 4, 4))
    check(world, [2, "a", 1, "F", 1], "uniform:30", donate(world, "a"))


@pytest.mark.parametrize("seed", range(4))
def test_models_of_other_shapes(seed: int) -> None:
    shapes = [(1, 2, 1, (1, 1, 2)), (2, 4, 4, (2, 1, 1)), (6, 4, 1, (4, 2, 2)), (3, 6, 2, (1, 3, 4))]
    layers, heads, kv_heads, section = shapes[seed]
    world = World(seed, config=engine_cases.model_config(layers, heads, kv_heads, section))
    world.picture("a", (1, 6, 4))
    world.picture("F", (1, 4, 4))
    check(world, [4, "F", 2, "a", 3], "pyramid:50-25", donate(world, "a"))


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_computed_per_layer_is_the_plan(plan: str) -> None:
    """The donor's object is overwritten with noise, so whatever a layer copied is recognized in the pages."""
    world = World(6)
    world.picture("a", (1, 8, 8))
    donate(world, "a")
    noise = world.object_of("a")
    noise.copy_(torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)))
    before = world.engine.stats()
    generation = world.generation([6, "a", 3], plan=plan, max_tokens=2)
    world.run(generation, mode=Mode.PREFILL)
    _, v = world.kv_of(generation.request_id)
    span, layers = generation.spans[0], world.layout.num_layers
    counts = Plan.parse(plan).counts(span.length, layers)
    after = world.engine.stats()
    for layer in range(layers):
        computed = (v[layer, span.start : span.end] != noise[layer, 1]).any(-1).any(-1)
        assert computed.nonzero()[:, 0].tolist() == list(range(counts[layer]))
        text = len(generation.token_ids) - span.length
        assert after.layer_rows[layer] - before.layer_rows[layer] == text + counts[layer]
        # Attention and MLP: only what a deeper layer still needs, and in the last layer the sampled position alone.
        deeper = text + counts[layer + 1] if layer + 1 < layers else 1
        assert after.layer_query_rows[layer] - before.layer_query_rows[layer] == deeper
    report = world.results[generation.request_id].done
    assert report is not None
    (span_report,) = report.reports
    assert span_report.recomputed_tokens == counts[0]
    assert span_report.reused_tokens == span.length - counts[0]
    assert span_report.recomputed_layer_tokens == sum(counts)
    assert report.cached_tokens == span.length - counts[-1]
    assert report.computed_rows == sum(text + count for count in counts)
