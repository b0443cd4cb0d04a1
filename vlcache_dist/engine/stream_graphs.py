"""A pass behind arriving KV, replayed from one CUDA graph per group of layers (see ``engine.graphs`` for shapes and
padding). The hidden state between two groups stays where the graphs have it, so one pass is under way at a time; other
graphs may be replayed in between."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch

from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.graphs import PaddedStep, Replayed, Shape, pad_step, padded_input, shape_for
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.upload import FixedInputs

log = logging.getLogger(__name__)
MAX_GROUPED = 24  #: shapes with their graphs
_REMEMBERED = 256  #: shapes seen once

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
        self._grouped: OrderedDict[Name, _Grouped] = OrderedDict()
        self._seen: OrderedDict[Name, None] = OrderedDict()
        # Not the pool of other graphs: what they leave there must not overwrite a pass that waits for its next group.
        self._pool = torch.cuda.graph_pool_handle()

    def begin(self, step: StepBatch, edges: tuple[int, ...]) -> GroupedReplay | None:
        """Bring the step's arrays to the device. None, and nothing is done, if it must be launched kernel by kernel: it
        fits no shape, or the shape is seen for the first time."""
        shape = shape_for(step)
        if shape is None:
            return None
        name = (shape, edges)
        graphs = self._grouped.get(name)
        if graphs is None:
            if name not in self._seen:
                self._seen[name] = None
                if len(self._seen) > _REMEMBERED:
                    self._seen.popitem(last=False)
                return None
            graphs = self._capture(name, step)
        self._grouped.move_to_end(name)
        graphs.inputs.wait()
        pad_step(step, shape, PaddedStep(*graphs.inputs.arrays))
        graphs.inputs.send()
        return GroupedReplay(graphs, step.num_samples)

    def _capture(self, name: Name, step: StepBatch) -> _Grouped:
        """Run once for the sake of lazy compilation, then capture. What that writes, the groups' replays overwrite."""
        shape, edges = name
        log.info("capturing %s in groups %s", astuple(shape), edges)
        if len(self._grouped) >= MAX_GROUPED:
            torch.cuda.synchronize()
            self._grouped.popitem(last=False)
        inputs = FixedInputs(PaddedStep.empty(shape, self._pages.shape[3]).arrays(), self._pages.device)
        pad_step(step, shape, PaddedStep(*inputs.arrays))
        inputs.send()
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
        captured = self._grouped[name] = _Grouped(inputs, graphs, hidden, logits, likeliest)
        return captured

    def _group(self, inputs: FixedInputs, shape: Shape, x: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
        return padded_group(self._model, inputs.tensors, shape, self._pages, self._arena, x, start, stop)


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
