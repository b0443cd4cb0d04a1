"""Warm prefill behind KV that is still arriving: the pass goes up the layers as far as the READ has come.

::

    provide(Reuse(groups=...)) ──arrived(layers)──> group 0 ──arrived──> group 1 ... last group, tokens drawn
                                                                                       │
           admit(object): generation, lease and checksum held ────────────────────────>├─> token, blocks, prefix cache
           revoke: a group was late, or the object is not valid ──────────────────────> erase, ask for another source

Nothing that depends on the arriving bytes leaves the pass before every source is admitted: no token is released, no
block is offered to other requests, no position counts as computed. What a withdrawn source left in the pages is
overwritten with zeros, because wrong bytes may be NaN, and masks do not silence NaN.

The pass is laid out and its inputs are sent while the first group is on its way. Between groups the engine is free for
other requests' steps. One chunk is streamed at a time; a second one waits, and is computed at once if its bytes are all
there by then.
"""

from __future__ import annotations

from collections.abc import Sequence as Values
from typing import Protocol

import numpy as np
import torch

from vlcache_dist.engine.batch import ChunkWork, StepBatch
from vlcache_dist.engine.runner import Pass, Runner
from vlcache_dist.engine.sequence import Sequence, SpanState, layer_groups
from vlcache_dist.engine.stream_graphs import GroupedForward, GroupedReplay
from vlcache_dist.engine.watch import Look
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.sampler import Sampled, SamplingBatch, sample
from vlcache_dist.model.upload import upload
from vlcache_dist.types import SamplingParams


class LayeredPass(Protocol):
    """A forward pass taken in runs of layers."""

    def run(self, start: int, stop: int) -> None:
        """Enqueue layers [start, stop): copy what is reused into their pages, then compute them."""
        ...

    def finish(self, params: Values[SamplingParams], draws: Values[int]) -> Pass:
        """Enqueue what follows the last layer (see ``Runner.launch``)."""
        ...


class Streamer:
    """Makes layered passes for one runner; owns their graphs, if it is to have any."""

    def __init__(self, runner: Runner, *, graphs: bool = True) -> None:
        self._runner = runner
        graphed = graphs and runner.device.type == "cuda"
        self._graphs = GroupedForward(runner.model, runner.pages, runner.arena.tensor) if graphed else None

    def begin(self, step: StepBatch, edges: tuple[int, ...]) -> LayeredPass:
        """From graphs, one per group, if the step is small; else kernel by kernel."""
        graphed = None if self._graphs is None else self._graphs.begin(step, edges)
        return EagerPass(self._runner, step) if graphed is None else GraphedPass(self._runner, graphed)

    def prepare(self) -> bool:
        """Do a piece of what will make coming passes faster; False if there is nothing left. No pass is under way."""
        return self._graphs is not None and self._graphs.capture_next()

    def erase(self, slots: np.ndarray) -> None:
        """Zero page slots (int64 [n]) in all layers, behind whatever is enqueued."""
        (on_device,) = upload((slots,), self._runner.device)
        pages: torch.Tensor = self._runner.pages.flatten(2, 3)
        pages.index_fill_(2, on_device, 0)


class GraphedPass:
    """See ``LayeredPass``."""

    def __init__(self, runner: Runner, forward: GroupedReplay) -> None:
        self._runner, self._forward = runner, forward

    def run(self, start: int, stop: int) -> None:
        """See ``LayeredPass.run``; exactly the edges that the pass was begun with."""
        self._forward.run(start, stop)

    def finish(self, params: Values[SamplingParams], draws: Values[int]) -> Pass:
        """See ``LayeredPass.finish``."""
        replayed = self._forward.result()
        if all(p.temperature == 0 and p.logprobs is None for p in params):
            return Pass(self._runner, Sampled(replayed.likeliest, None, None, None), params)
        batch = SamplingBatch.build(params, draws, self._runner.device)
        return Pass(self._runner, sample(replayed.logits, batch), params)


class EagerPass:
    """Kernel by kernel; equal, bit for bit, to ``Runner.launch`` of the same step without graphs."""

    def __init__(self, runner: Runner, step: StepBatch) -> None:
        self._runner = runner
        self._scatter = ScatterBatch.from_step(step, runner.device)
        self._batch = ForwardBatch.from_step(step, runner.device)
        self._x: torch.Tensor | None = None

    def run(self, start: int, stop: int) -> None:
        """See ``LayeredPass.run``."""
        runner, batch = self._runner, self._batch
        if self._scatter is not None:
            runner.model.scatter(self._scatter, runner.pages, runner.arena.tensor, start, stop)
        if self._x is None:  # not earlier: encoder output arrives as well
            self._x = runner.model.embed(batch, runner.arena.tensor)
        if batch.rows_kv[start]:
            self._x = runner.model.run_layers(self._x, batch, runner.pages, runner.arena.tensor, start, stop)

    def finish(self, params: Values[SamplingParams], draws: Values[int]) -> Pass:
        """See ``LayeredPass.finish``."""
        if not params:
            return Pass(self._runner, None, ())
        assert self._x is not None, "no layer was run"
        logits = self._runner.model.logits(self._x)
        return Pass(self._runner, sample(logits, SamplingBatch.build(params, draws, self._runner.device)), params)


class StreamedChunk:
    """A sequence's chunk on its way up the layers. The sequence takes no part in other steps meanwhile."""

    def __init__(self, streamer: Streamer, sequence: Sequence, chunk: ChunkWork, step: StepBatch) -> None:
        self.sequence, self.chunk, self.step = sequence, chunk, step
        self.spans: list[SpanState] = sequence.arriving(chunk)
        self.look: Look | None = None
        self._streamer = streamer
        self._edges = layer_groups(self.spans)
        self._next = 0  # group
        self._places = [(work.kv_base, work.embed_base) for work in chunk.spans]
        self._layers = streamer.begin(step, self._edges)
        self._pass: Pass | None = None
        sequence.streaming = True

    @property
    def ready(self) -> bool:
        """``advance`` would do something, or everything is done and admitted."""
        if self._pass is None:
            return self._here() >= self._edges[self._next + 1]
        return self.admitted

    @property
    def admitted(self) -> bool:
        return not any(state.arriving for state in self.spans)

    @property
    def moved(self) -> bool:
        """A source was admitted in another place than it arrived in (its twin was there first)."""
        return self._places != [(work.kv_base, work.embed_base) for work in self.chunk.spans]

    def advance(self) -> bool:
        """Enqueue the groups that can be computed; True once the last one, and the drawing of tokens, is enqueued."""
        while self._pass is None and self._here() >= self._edges[self._next + 1]:
            self._layers.run(self._edges[self._next], self._edges[self._next + 1])
            self._next += 1
            if self._next == len(self._edges) - 1:
                sampled = [self.sequence] if self.chunk.sample else []
                self._pass = self._layers.finish([s.sampling for s in sampled], [s.num_generated for s in sampled])
        return self._pass is not None

    def result(self) -> Pass:
        assert self._pass is not None, "the last group was not enqueued"
        return self._pass

    def erase(self) -> None:
        """Zero what the pass has written, and let the sequence go."""
        self._streamer.erase(self.sequence.slots(self.chunk.start, self.chunk.end))
        self.sequence.streaming = False

    def _here(self) -> int:
        return min(state.layers_here for state in self.spans)
