"""When graphs are captured: as a pure state machine, and in the engine with graphs that are emulated on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_graphs import CONFIG, FRESH, REUSED, TEXT_ONLY, memory, step_of

from vlcache_dist.bench.shapes import random_models
from vlcache_dist.engine import graphs
from vlcache_dist.engine.graph_shapes import prefill_shapes
from vlcache_dist.engine.graphs import GraphedForward
from vlcache_dist.model import vision_graphs
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.graph_policy import WORTH_ITS_OWN, GraphPolicy
from vlcache_dist.model.vision_graphs import GraphedTower
from vlcache_dist.model.vision_layout import vision_layout


def policy(limit: int = 4) -> GraphPolicy[int]:
    """A graph of n rows holds steps of at least half as many."""
    return GraphPolicy(lambda graph, step: step <= graph <= 2 * step, lambda graph: graph, limit)


@given(st.lists(st.tuples(st.sampled_from(("use", "idle", "plan", "fail")), st.integers(1, 40)), max_size=80))
def test_a_step_is_replayed_from_the_least_graph_that_pays(events: list[tuple[str, int]]) -> None:
    chosen, limit = policy(), 4
    there: list[int] = []
    failed: set[int] = set()
    planned: set[int] = set()
    kept: set[int] = set()
    for event, rows in events:
        if event == "plan":
            chosen.plan([rows])
            if rows not in there and rows not in failed:
                planned.add(rows)
        elif event == "use":
            graph = chosen.use(rows)
            able = [n for n in there if rows <= n <= 2 * rows]
            assert graph == (rows if rows in there else min(able, default=None))
            if graph is not None:
                there.remove(graph)
                there.append(graph)
        else:
            shape = chosen.next()
            if shape is None:
                continue
            assert shape not in there and shape not in failed
            old = chosen.make_room()
            assert (old is not None) == (len(there) == limit)
            if old is not None:
                expected = next((n for n in there if n not in kept), there[0])
                assert old == expected, "the least recently used is given up, planned ones last"
                there.remove(old)
                kept.discard(old)
            if event == "fail":
                failed.add(shape)
                chosen.give_up(shape)
            else:
                there.append(shape)
                chosen.captured(shape, 0.1)
                if shape in planned:
                    kept.add(shape)
            planned.discard(shape)
        assert chosen.report().captured == len(there) <= limit


def test_who_makes_room() -> None:
    """The least recently used goes first; what was planned stays as long as there is anything else."""
    chosen = policy(limit=3)
    chosen.plan([1])
    for shape in (1, 10, 100):
        assert chosen.make_room() is None
        chosen.captured(shape, 0.0)
    assert chosen.use(10) == 10 and chosen.use(1) == 1
    assert chosen.make_room() == 100
    chosen.captured(1000, 0.0)
    assert chosen.use(10) == 10
    assert chosen.make_room() == 1000, "10 was used since, 1 was planned"
    chosen.captured(2000, 0.0)
    assert [chosen.make_room(), chosen.use(10)] == [10, None]
    chosen.captured(3000, 0.0)
    left = {chosen.use(shape) for shape in (1, 2000, 3000)}
    assert left == {1, 2000, 3000}


def test_what_nobody_holds_comes_first_then_the_plan_then_what_keeps_coming_back() -> None:
    chosen = policy()
    chosen.plan([8, 100])
    assert chosen.use(7) is None and chosen.use(30) is None and chosen.use(200) is None
    assert chosen.next() == 8, "what came once may not come again"
    assert chosen.use(7) is None and chosen.use(30) is None
    order = []
    while (shape := chosen.next()) is not None:
        order.append(shape)
        chosen.captured(shape, 0.0)
    assert order == [30, 7, 8, 100], "200 came once"
    for _ in range(WORTH_ITS_OWN - 1):
        assert chosen.use(5) == 7
        assert chosen.next() is None, "a larger graph serves"
    chosen.use(5)
    assert chosen.next() == 5
    report = chosen.report()
    assert (report.replayed, report.replayed_larger, report.launched) == (0, WORTH_ITS_OWN, 5)


class Emulated:
    """A CUDA graph on CPU: replaying computes again into the same outputs."""

    count = 0

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run, self.result = run, run()
        Emulated.count += 1

    @torch.inference_mode()
    def replay(self) -> None:
        mine = self.result if isinstance(self.result, tuple) else (self.result,)
        again = self._run()
        for target, source in zip(mine, again if isinstance(again, tuple) else (again,), strict=True):
            target.copy_(source)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> type[Emulated]:
    def captured(run: Callable[[], Any], pool: Any) -> tuple[Emulated, Any]:
        graph = Emulated(torch.inference_mode()(run))
        return graph, graph.result

    for module in (graphs, vision_graphs):
        monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    Emulated.count = 0
    return Emulated


def test_random_steps_are_replayed_and_never_wait_for_a_capture(emulated: type[Emulated]) -> None:
    language, _ = random_models(CONFIG, torch.device("cpu"), torch.float32)
    pages, arena = memory("cpu", torch.float32)
    plain, recorded = pages.clone(), arena.clone()
    forward = GraphedForward(language, pages, arena)
    forward.plan(prefill_shapes(256, 4, 512))
    while forward.capture_next():
        pass
    at_start = emulated.count
    rng = np.random.default_rng(0)
    for _ in range(20):
        kinds = rng.choice([TEXT_ONLY, REUSED, FRESH], int(rng.integers(1, 4)))
        step = step_of(rng, [(int(rng.integers(0, 40)), int(rng.integers(1, 30)), int(kind)) for kind in kinds])
        before = emulated.count
        done = forward.run(step)
        assert done is not None and emulated.count == before
        scatter = ScatterBatch.from_step(step, "cpu")
        expected = language.forward(ForwardBatch.from_step(step, "cpu"), plain, recorded, scatter)
        torch.testing.assert_close(done.logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pages, plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(arena, recorded, rtol=1e-4, atol=1e-4)
        pages.copy_(plain)
        arena.copy_(recorded)
        if rng.random() < 0.3:
            forward.capture_next()
    report = forward.report()
    assert report.launched == 0 and report.replayed_larger > 0 and report.captured == emulated.count >= at_start


def test_a_graph_without_memory_is_not_tried_again(emulated: type[Emulated], monkeypatch: pytest.MonkeyPatch) -> None:
    language, _ = random_models(CONFIG, torch.device("cpu"), torch.float32)
    forward = GraphedForward(language, *memory("cpu", torch.float32))

    def no_memory(run: Callable[[], Any], pool: Any) -> None:
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(graphs, "captured", no_memory)
    step = step_of(np.random.default_rng(0), [(0, 5, TEXT_ONLY)])
    assert forward.run(step) is None and forward.run(step) is None and forward.capture_next()
    assert forward.run(step) is None and not forward.capture_next(), "it is launched kernel by kernel"


def test_pictures_are_replayed_from_larger_graphs(emulated: type[Emulated]) -> None:
    _, tower = random_models(CONFIG, torch.device("cpu"), torch.float32)
    merged = CONFIG.vision.spatial_merge_size**2
    graphed = GraphedTower(
        torch.inference_mode()(tower._encode), CONFIG.vision.patch_elements, merged, torch.device("cpu"), torch.float32
    )
    for _ in range(3):
        assert graphed.capture_next()
    rng = np.random.default_rng(1)
    for grids in ([(1, 8, 8)], [(1, 12, 20), (1, 4, 4)], [(2, 8, 12)], [(1, 20, 24)], [(1, 6, 34)]):
        layout = vision_layout(grids, CONFIG.vision)
        patches = torch.from_numpy(
            rng.standard_normal((layout.row_column.shape[1], CONFIG.vision.patch_elements), np.float32)
        )
        before = emulated.count
        rows = graphed.run(patches, layout)
        assert rows is not None and emulated.count == before
        torch.testing.assert_close(rows[layout.inverse], tower.forward(patches, grids), rtol=1e-4, atol=1e-4)
    assert graphed.report().replayed_larger == 5
