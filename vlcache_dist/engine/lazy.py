"""What a GPU does at first use, done before somebody waits: kernels are compiled and loaded.

A Triton kernel is compiled for every combination of its compile-time constants and of properties of its arguments, a
library's kernel is loaded when a product first has its shape: a second or two, and milliseconds. ``compile_ahead`` runs
padding, which writes nothing, through the model in the sizes for which they differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vlcache_dist import kernels
from vlcache_dist.engine.graph_shapes import eager_shapes
from vlcache_dist.engine.graphs import padded_input, padded_logits, padding
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.sampler import SamplingBatch, sample
from vlcache_dist.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Traffic:
    """Steps to come: rows of a step, sequences at a time, tokens of a sequence; whether sequences are decoded."""

    max_rows: int
    max_batch: int
    max_keys: int
    decodes: bool


def compile_ahead(model: LanguageModel, pages: torch.Tensor, arena: torch.Tensor, traffic: Traffic) -> None:
    """Use every kernel of such steps once, writing nothing to ``pages`` and ``arena``; waits for the device. Nothing
    where Triton is not used."""
    if not kernels.uses_triton(pages):
        return
    kernels.compile_attention(model.config.num_heads, pages[0, 0], pages[0, 1])
    kernels.compile_swiglu(model.layers[0].gate_up)
    layers = model.config.num_layers
    for shape in eager_shapes(traffic.max_rows):
        inputs = padding(shape, pages)
        logits = padded_logits(model, inputs.tensors, shape, pages, arena)
        if shape.near:  # a chunk that ends before its prompt does has no row behind the last layer's K and V
            x, batch, _ = padded_input(model, inputs.tensors, shape, arena)
            rows_q, segs_q = (*batch.rows_q[:-1], 0), (*batch.segs_q[:-1], 0)
            batch = replace(batch, rows_q=rows_q, segs_q=segs_q, num_samples=0)
            model.run_layers(x, batch, pages, arena, 0, layers)
    sample_all_ways(torch.zeros_like(logits))
    nowhere = torch.full((1,), -1, dtype=torch.int64, device=pages.device)
    kernels.pack_rows(pages, nowhere, arena, 0)
    kernels.unpack_rows(arena, 0, pages, nowhere)
    kernels.word_sums(arena[: 1 << 10].view(torch.int32))
    if pages.is_cuda:
        torch.cuda.synchronize()


def sample_all_ways(logits: torch.Tensor) -> None:
    """Draw from fp32 [1, vocab] with everything that a request may ask for."""
    for params in (
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=50, logprobs=5),
        SamplingParams(logprobs=5),
    ):
        sample(logits, SamplingBatch.build([params], [0], logits.device)).to_host([params])
