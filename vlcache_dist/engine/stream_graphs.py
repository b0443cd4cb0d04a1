"""A pass behind arriving KV, replayed from one CUDA graph per group of layers (see ``engine.graphs`` for shapes and
padding). The hidden state between two groups stays where the graphs have it, so one pass is under way at a time; other
graphs may be replayed in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import pairwise

import torch

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.graph_shapes import Shape, cost, shape_for
from vlcache_dist.engine.graphs import PaddedStep, Replayed, launched_by, pad_step, padded_input, padding, pays
from vlcache_dist.model.graph_policy import GraphPolicy, GraphReport
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.upload import FixedInputs

log = logging.getLogger(__name__)
MAX_GROUPED = 24  #: shapes with their graphs

Name = tuple[Shape, tuple[int, ...]]


@dataclass(slots=True)
class _Grouped:
    inputs: FixedInputs
    graphs: dict[tuple[int, int], torch.cuda.CUDAGraph]
    hidden: list[torch.Tensor]  # between groups: kept, so that no other graph is given its memory
    logits: torch.Tensor
    likeliest: torch.Tensor


class GroupedReplay:
    """One step on its way through the graphs of its shape."""

    def __init__(self, graphs: _Grouped, num_samples: int) -> None:
        self._graphs, self._num_samples = graphs, num_samples

    def run(self, start: int, stop: int) -> None:
        self._graphs.graphs[start, stop].replay()

    def result(self) -> Replayed:
        """Valid until the next pass."""
        return Replayed(self._graphs.logits[: self._num_samples], self._graphs.likeliest[: self._num_samples])


class GroupedForward:
    """Graphs of one model over one set of pages and one arena. One thread owns it."""

    def __init__(self, model: LanguageModel, pages: torch.Tensor, arena: torch.Tensor) -> None:
        self._model = model
        self._pages = pages
        self._arena = arena
        self._policy: GraphPolicy[Name] = GraphPolicy(partial(_pays, launched_by(model)), _cost, MAX_GROUPED)
        self._grouped: dict[Name, _Grouped] = {}
        # Not the pool of other graphs: what they leave there must not overwrite a pass that waits for its next group.
        self._pool = torch.cuda.graph_pool_handle()

    def begin(self, step: StepBatch, edges: tuple[int, ...]) -> GroupedReplay | None:
        """Bring the step's arrays to the device. None, and nothing is done, if it must be launched kernel by kernel: it
        fits no shape, or there are no graphs yet."""
        least = shape_for(step)
        name = None if least is None else self._policy.use((least, edges))
        if name is None:
            return None
        graphs = self._grouped[name]
        graphs.inputs.wait()
        pad_step(step, name[0], PaddedStep(*graphs.inputs.arrays))
        graphs.inputs.send()
        return GroupedReplay(graphs, step.num_samples)

    def capture_next(self) -> bool:
        """Capture one shape's graphs; False if none are wanted. No pass may be under way. Runs padding through the
        model once, for the sake of lazy initialization: that writes nothing to pages and arena."""
        name = self._policy.next()
        if name is None:
            return False
        shape, edges = name
        log.info("capturing %s in groups %s", astuple(shape), edges)
        if (old := self._policy.make_room()) is not None:
            torch.cuda.synchronize()
            del self._grouped[old]
        started = time.perf_counter()
        try:
            self._grouped[name] = self._make(shape, edges)
        except torch.OutOfMemoryError as error:
            log.warning("no memory for the graphs of %s, such passes are launched kernel by kernel: %s", shape, error)
            self._policy.give_up(name)
        else:
            self._policy.captured(name, time.perf_counter() - started)
        return True

    def report(self) -> GraphReport:
        return self._policy.report()

    def _make(self, shape: Shape, edges: tuple[int, ...]) -> _Grouped:
        inputs = padding(shape, self._pages)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            x: torch.Tensor | None = None
            for start, stop in pairwise(edges):
                x = self._group(inputs, shape, x, start, stop)
            assert x is not None
            self._model.logits(x).argmax(-1)
        current.wait_stream(side)
        torch.cuda.synchronize()
        graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        hidden: list[torch.Tensor] = []
        x = None
        for start, stop in pairwise(edges):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                x = self._group(inputs, shape, x, start, stop)
                if stop == edges[-1]:
                    logits = self._model.logits(x)
                    likeliest = logits.argmax(-1)
            graphs[start, stop] = graph
            hidden.append(x)
        return _Grouped(inputs, graphs, hidden, logits, likeliest)

    def _group(self, inputs: FixedInputs, shape: Shape, x: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
        return padded_group(self._model, inputs.tensors, shape, self._pages, self._arena, x, start, stop)


def _pays(launched: int, graph: Name, step: Name) -> bool:
    return graph[1] == step[1] and pays(launched, graph[0], step[0])


def _cost(graph: Name) -> tuple[int, ...]:
    return cost(graph[0])


@torch.inference_mode()
def padded_group(
    model: LanguageModel,
    tensors: Sequence[torch.Tensor],
    shape: Shape,
    pages: torch.Tensor,
    arena: torch.Tensor,
    x: torch.Tensor | None,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Hidden state behind layers [start, stop) of a padded step, reused tokens scattered first; ``x``: behind layer
    ``start - 1``, None at the beginning. What a graph captures; runs anywhere."""
    first, batch, reused = padded_input(model, tensors, shape, arena)
    if reused is not None:
        model.scatter(reused, pages, arena, start, stop)
    return model.run_layers(first if x is None else x, batch, pages, arena, start, stop)
