"""The tensors of an engine: weights, pages and arena, and what is done to them. Knows nothing of requests.

Everything is enqueued on the current stream of the caller's thread; ``execute`` waits for the drawn tokens, the rest
returns without waiting unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlcache_dist import kernels
from vlcache_dist.engine.batch import StepBatch
from vlcache_dist.kv.arena import Arena
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.sampler import SamplingBatch, sample
from vlcache_dist.model.upload import upload
from vlcache_dist.types import SamplingParams, TokenLogprobs


class Runner:
    """``pages`` [layer, 2, block, block_size, kv_head, head_dim] and ``arena`` in the model's dtype and on its device.
    One thread owns it."""

    def __init__(self, model: LanguageModel, pages: torch.Tensor, arena: Arena) -> None:
        if pages.dtype != model.dtype or arena.tensor.dtype != model.dtype:
            raise ValueError(f"pages {pages.dtype} and arena {arena.tensor.dtype} must have the model's {model.dtype}")
        self.model = model
        self.pages = pages
        self.arena = arena
        self.device = model.device

    def execute(
        self, step: StepBatch, params: Sequence[SamplingParams], draws: Sequence[int]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """One forward pass: scatter, compute, record, draw. ``params`` and ``draws`` (index of the token within its
        answer) belong to the step's sampled rows, in order. On return everything the step wrote is visible."""
        batch = ForwardBatch.from_step(step, self.device)
        scatter = ScatterBatch.from_step(step, self.device)
        logits = self.model.forward(batch, self.pages, self.arena.tensor, scatter)
        if not params:
            self.synchronize()
            return [], []
        return sample(logits, SamplingBatch.build(params, draws, self.device)).to_host(params)

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

    def store_embeddings(self, rows: torch.Tensor, extent: Extent) -> None:
        """Copy encoder output [n, hidden] of any dtype and device into an embedding extent; waits until it is there."""
        self.arena.embedding_view(extent, len(rows)).copy_(rows)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
