"""The tensors of an engine: weights, pages and arena, and what is done to them. Knows nothing of requests.

Everything is enqueued on the current stream of the caller's thread and returns without waiting for the device, unless
it says otherwise; what is enqueued later sees what was enqueued before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vlcache_dist import kernels
from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.engine.graph_shapes import decode_shapes, prefill_shapes
from vlcache_dist.engine.graphs import GraphedForward
from vlcache_dist.engine.lazy import Traffic, compile_ahead
from vlcache_dist.kv.arena import Arena
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.graph_policy import GraphReport
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.sampler import Sampled, SamplingBatch, sample
from vlcache_dist.model.upload import upload
from vlcache_dist.types import SamplingParams, TokenLogprobs


class Pass:
    """A forward pass under way."""

    def __init__(self, runner: Runner, sampled: Sampled | None, params: Sequence[SamplingParams]) -> None:
        self._runner = runner
        self._sampled = sampled
        self._params = params

    def result(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Wait until everything the pass wrote is there; the drawn tokens and, for rows that asked, their logprobs."""
        if self._sampled is None:
            self._runner.synchronize()
            return [], []
        return self._sampled.to_host(self._params)


class Runner:
    """``pages`` [layer, 2, block, block_size, kv_head, head_dim] and ``arena`` in the model's dtype and on its device.
    One thread owns it. ``graphs``: replay small passes from CUDA graphs."""

    def __init__(self, model: LanguageModel, pages: torch.Tensor, arena: Arena, *, graphs: bool = True) -> None:
        if pages.dtype != model.dtype or arena.tensor.dtype != model.dtype:
            raise ValueError(f"pages {pages.dtype} and arena {arena.tensor.dtype} must have the model's {model.dtype}")
        self.model = model
        self.pages = pages
        self.arena = arena
        self.device = model.device
        graphed = graphs and kernels.uses_triton(pages)
        self._graphs = GraphedForward(model, pages, arena.tensor) if graphed else None

    def launch(self, step: StepBatch, params: Sequence[SamplingParams], draws: Sequence[int]) -> Pass:
        """Start a forward pass: scatter, compute, record, draw. ``params`` and ``draws`` (index of the token within its
        answer) belong to the step's sampled rows, in order."""
        replayed = None if self._graphs is None else self._graphs.run(step)
        if replayed is not None and all(p.temperature == 0 and p.logprobs is None for p in params):
            return Pass(self, Sampled(replayed.likeliest, None, None, None), params)
        logits = self._forward(step) if replayed is None else replayed.logits
        if not params:
            return Pass(self, None, ())
        return Pass(self, sample(logits, SamplingBatch.build(params, draws, self.device)), params)

    def _forward(self, step: StepBatch) -> torch.Tensor:
        """Kernel by kernel: reused tokens into the pages, then the pass itself."""
        scatter, batch = ScatterBatch.from_step(step, self.device), ForwardBatch.from_step(step, self.device)
        return self.model.forward(batch, self.pages, self.arena.tensor, scatter)

    def expect(self, traffic: Traffic) -> None:
        """Compile and load what steps of this kind use, and plan their graphs, which ``prepare`` captures."""
        compile_ahead(self.model, self.pages, self.arena.tensor, traffic)
        if self._graphs is not None:
            if traffic.decodes:
                self._graphs.plan(decode_shapes(traffic.max_batch, traffic.max_keys))
            self._graphs.plan(prefill_shapes(traffic.max_rows, traffic.max_batch, traffic.max_keys))

    def prepare(self) -> bool:
        """Do a piece of what will make coming steps faster; False if there is nothing left to prepare."""
        return self._graphs is not None and self._graphs.capture_next()

    def graph_report(self) -> GraphReport | None:
        """What became of the graphs; None if there are none to be. Any thread."""
        return None if self._graphs is None else self._graphs.report()

    def pack(self, slots: np.ndarray, staging: Extent) -> None:
        """Copy the slots' rows (int64 [n]) into a staging extent of n rows; waits until they are there."""
        (on_device,) = upload((slots,), self.device)
        kernels.pack_rows(self.pages, on_device, self.arena.tensor, staging.offset)
        self.synchronize()

    def unpack(self, staging: Extent, slots: np.ndarray) -> None:
        """The inverse of ``pack``; does not wait."""
        (on_device,) = upload((slots,), self.device)
        kernels.unpack_rows(self.arena.tensor, staging.offset, self.pages, on_device)

    def scatter(self, src: np.ndarray, span_tokens: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """Copy n cached tokens into all layers of the pages, K rotated (see ``model.batch.ScatterBatch``)."""
        batch = ScatterBatch(*upload((src, span_tokens, slots, positions), self.device))
        self.model.scatter(batch, self.pages, self.arena.tensor, 0, self.model.config.num_layers)

    def compare(
        self, extents: Sequence[tuple[int, int]], probes: Sequence[np.ndarray], slots: np.ndarray
    ) -> torch.Tensor:
        """fp32 [2, layer, P]: per layer and probe |fresh - cached|^2 and |cached|^2 of V, over all KV heads.
        ``extents``: (offset, tokens) of each span's KV object, ``probes`` int64 [p]: tokens of it, ``slots`` int64
        [P]: where the pages hold them all, in order. Does not wait."""
        on_device, *at = upload([slots, *probes], self.device)
        fresh = self.pages[:, 1].flatten(1, 2).index_select(1, on_device).float()
        layout = self.arena.layout
        parts = []
        for (offset, tokens), rows in zip(extents, at, strict=True):
            stored = self.arena.tensor[offset : offset + layout.kv_elements(tokens)]
            parts.append(stored.view(layout.num_layers, 2, tokens, *fresh.shape[2:])[:, 1].index_select(1, rows))
        cached = torch.cat(parts, 1).float()
        return torch.stack([(fresh - cached).square().sum((-2, -1)), cached.square().sum((-2, -1))])

    @torch.inference_mode()
    def reread(self, step: StepBatch, layer: int, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One sampled row over pages that are filled, its own KV included: its logits fp32 [vocab], and the attention
        that it pays in ``layer`` to the keys at ``slots`` int64 [n] (all that it sees), summed over heads: fp32 [n].
        Writes nothing. Does not wait."""
        batch = ForwardBatch.from_step(step, self.device)
        batch.slots.fill_(-1)
        model, arena, layers = self.model, self.arena.tensor, self.model.config.num_layers
        x = model.embed(batch, arena)
        if layer:
            x = model.run_layers(x, batch, self.pages, arena, 0, layer)
        q = model.queries(x, layer, batch)[0].float()
        logits = model.logits(model.run_layers(x, batch, self.pages, arena, layer, layers))[0]
        (on_device,) = upload((slots,), self.device)
        keys = self.pages[layer, 0].flatten(0, 1).index_select(0, on_device).float()
        scores = torch.einsum("hgd,nhd->hgn", q.view(keys.shape[1], -1, q.shape[-1]), keys) * q.shape[-1] ** -0.5
        return logits, scores.softmax(-1).sum((0, 1))

    @torch.inference_mode()
    def lend(
        self,
        extent: tuple[int, int],
        probes: np.ndarray,
        slots: np.ndarray,
        positions: np.ndarray,
        target: Extent,
    ) -> None:
        """Fill ``target``, a staging extent of the same size, with the KV object at ``extent`` (offset, tokens), to all
        tokens of which is added, layer by layer, what tokens ``probes`` int64 [p] of it have gained on average in the
        pages (slots int64 [p], positions int32 [3, p]): K before rotation, and V. Does not wait."""
        (offset, tokens), layout = extent, self.arena.layout
        at, rows, where = upload((slots, probes, positions), self.device)
        size = layout.kv_elements(tokens)
        heads, dim = self.pages.shape[-2:]
        stored, shifted = (
            self.arena.tensor[start : start + size].view(layout.num_layers, 2, tokens, heads, dim)
            for start in (offset, target.offset)
        )
        cos, sin = (x.repeat(layout.num_layers, 1) for x in self.model.rope(where))
        fresh = self.pages.flatten(2, 3).index_select(2, at)  # [layer, 2, p, head, dim]
        fresh[:, 0] = kernels.rotate(fresh[:, 0].flatten(0, 1), cos, -sin).view_as(fresh[:, 0])
        gained = fresh.float() - stored.index_select(2, rows).float()
        torch.add(stored, gained.mean(2, keepdim=True).to(stored.dtype), out=shifted)

    def store_embeddings(self, rows: torch.Tensor, extent: Extent) -> None:
        """Copy encoder output [n, hidden] of any dtype and device into an embedding extent; waits until it is there."""
        self.arena.embedding_view(extent, len(rows)).copy_(rows)
        self.synchronize()

    def on_lost(self, tell: Callable[[BaseException], None]) -> None:
        """Call ``tell``, from any thread, if something this runner cannot do without is lost (a shard's process)."""

    def close(self) -> None:
        """End what was started for this runner. Idempotent; any thread, when no pass is under way."""

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
