"""From logits to tokens, batched on the device.

Randomness is counter-based: the draw for a request's i-th answer token depends on (seed, i) alone, so the same request
gives the same answer whatever it is batched with, and on whichever worker it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlcache_dist.model.upload import upload
from vlcache_dist.types import SamplingParams, TokenLogprobs

_U64 = (1 << 64) - 1


def uniform(seeds: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """float64 [n] in [0, 1), one draw per (seed, step): SplitMix64 of the counter ``step`` in the stream ``seed``."""
    stream = _mix(np.array([seed & _U64 for seed in seeds], np.uint64))
    counter = np.array([step + 1 for step in steps], np.uint64)
    return (_mix(stream + counter * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) / 2.0**32


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(slots=True)
class SamplingBatch:
    """What n rows want, on the device. ``all_greedy``, ``any_filter`` and ``num_logprobs`` (the most any row asks for,
    None: no row does) let ``sample`` skip work that no row needs."""

    temperature: torch.Tensor  # fp32 [n], 0: greedy
    top_p: torch.Tensor  # fp32 [n]
    top_k: torch.Tensor  # int64 [n], the vocabulary's size or more: off
    draw: torch.Tensor  # float64 [n] in [0, 1)
    all_greedy: bool
    any_filter: bool
    num_logprobs: int | None

    @classmethod
    def build(cls, params: Sequence[SamplingParams], steps: Sequence[int], device: torch.device | str) -> SamplingBatch:
        """``steps``: the index, within its answer, of the token each row is about to draw."""
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        temperature, top_p, top_k, draw = upload(
            (
                np.array([p.temperature for p in params], np.float32),
                np.array([p.top_p for p in params], np.float32),
                np.array([p.top_k if p.top_k > 0 else np.iinfo(np.int64).max for p in params], np.int64),
                uniform([p.seed for p in params], steps),
            ),
            device,
        )
        return cls(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            draw=draw,
            all_greedy=all(p.temperature == 0 for p in params),
            any_filter=any(p.temperature != 0 and (p.top_p < 1 or p.top_k > 0) for p in params),
            num_logprobs=max(wanted) if wanted else None,
        )


@dataclass(slots=True)
class Sampled:
    """Drawn tokens, still on the device. Logprobs are natural logs under the model's own distribution, before
    temperature and filters; None where no row asked."""

    token_ids: torch.Tensor  # int64 [n]
    logprob: torch.Tensor | None  # fp32 [n], of the drawn token
    top_ids: torch.Tensor | None  # int64 [n, num_logprobs], best first
    top_logprobs: torch.Tensor | None  # fp32 [n, num_logprobs]

    def to_host(self, params: Sequence[SamplingParams]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Token ids and, for rows that asked, their logprobs. Waits for the device."""
        tokens: list[int] = self.token_ids.tolist()
        if self.logprob is None or self.top_ids is None or self.top_logprobs is None:
            return tokens, [None] * len(tokens)
        own, ids, values = self.logprob.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist()
        return tokens, [
            None
            if p.logprobs is None
            else TokenLogprobs(token, own[i], tuple(zip(ids[i][: p.logprobs], values[i][: p.logprobs], strict=True)))
            for i, (token, p) in enumerate(zip(tokens, params, strict=True))
        ]


@torch.inference_mode()
def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """logits fp32 [n, V]. Temperature first, then top-k, then top-p over what top-k left, as transformers does; the
    most likely token is always kept. No host synchronization."""
    tokens = logits.argmax(-1)
    if not batch.all_greedy:
        greedy = batch.temperature == 0
        tokens = torch.where(greedy, tokens, _draw(logits, batch, greedy))
    if batch.num_logprobs is None:
        return Sampled(tokens, None, None, None)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(batch.num_logprobs, logits.shape[-1]), -1)
    return Sampled(tokens, logprobs.gather(-1, tokens[:, None])[:, 0], top.indices, top.values)


def _draw(logits: torch.Tensor, batch: SamplingBatch, greedy: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in the order of token ids (near-equal probabilities may swap ranks between batches, ids do not)."""
    temperature = torch.where(greedy, 1.0, batch.temperature)[:, None]
    probability = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if batch.any_filter:
        probability = probability * _kept(probability, batch)
    cumulative = probability.double().cumsum(-1)
    threshold = batch.draw[:, None] * cumulative[:, -1:]  # below the total: a draw is at most 1 - 2**-32
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _kept(probability: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """bool [n, V]: tokens that top-k and top-p leave."""
    ranked, ids = probability.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    inside = rank < batch.top_k[:, None]
    ranked = ranked * inside
    before = ranked.cumsum(-1) - ranked
    off = batch.top_p[:, None] >= 1
    inside &= off | (before < batch.top_p[:, None] * ranked.sum(-1, keepdim=True)) | (rank == 0)
    return torch.zeros_like(inside).scatter_(-1, ids, inside)
