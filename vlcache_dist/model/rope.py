"""M-RoPE: every prompt position has three indices (t, h, w), and each rotary frequency follows one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlcache_dist.model.config import ModelConfig, TextConfig
from vlcache_dist.types import MediaSpan


def mrope_positions(token_count: int, spans: Sequence[MediaSpan], config: ModelConfig) -> tuple[np.ndarray, int]:
    """Positions int32 [3, token_count] of a prompt, and the decode delta.

    ``spans`` are in prompt order and do not overlap. Text counts up on all three axes; a span of grid (t, h, w) starts
    at the running position on all axes, and the text after it continues at start + max(h, w) / merge. The token
    generated at index i >= token_count has position i + delta on all axes: generated text continues the prompt's text,
    so it keeps its positions when it comes back as part of the next turn's prompt. transformers' ``generate`` does the
    same; its ``rope_deltas`` count from the largest position instead, which is another one where a video's t axis
    runs ahead of the text after it.

    The t axis of a video advances by tokens_per_second * second_per_grid per temporal patch, each product truncated to
    an integer (so several patches share an index where the interval is below 1); an image advances by 1. The arithmetic
    is fp32, as in the model's original code and in transformers 5.23; 5.17 truncates second_per_grid *before* the
    multiplication, which differs for videos whose second_per_grid is not whole.

    Raises ValueError for a span that does not fit its grid, the prompt, or its predecessor.
    """
    merge = config.vision.spatial_merge_size
    positions = np.empty((3, token_count), np.int32)
    cursor, position = 0, 0
    for span in spans:
        t, h, w = span.grid[0], span.grid[1] // merge, span.grid[2] // merge
        if span.length != t * h * w:
            raise ValueError(f"span at {span.start}: {span.length} tokens do not fit the grid {span.grid}")
        if span.start < cursor or span.end > token_count:
            raise ValueError(f"span at {span.start} overlaps its predecessor or leaves the prompt of {token_count}")
        text = span.start - cursor
        positions[:, cursor : span.start] = np.arange(position, position + text)
        position += text
        temporal = _temporal(span, t, config)[:, None, None]
        for row, axis in zip(positions, (temporal, np.arange(h)[:, None], np.arange(w)), strict=True):
            row[span.start : span.end].reshape(t, h, w)[...] = position + axis
        position += max(h, w)
        cursor = span.end
    positions[:, cursor:] = np.arange(position, position + token_count - cursor)
    return positions, position - cursor


def _temporal(span: MediaSpan, patches: int, config: ModelConfig) -> np.ndarray:
    if span.modality == "image":
        return np.arange(patches)
    interval = np.float32(config.vision.tokens_per_second) * np.float32(span.second_per_grid)
    return (np.arange(patches, dtype=np.float32) * interval).astype(np.int64)


class MRope:
    """Rotary angles of the language model. cos and sin stay fp32; transformers casts them to the model's dtype."""

    def __init__(self, config: TextConfig, device: torch.device | str) -> None:
        dim = config.head_dim
        frequency = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        axis = [i % 3 for i, section in enumerate(config.mrope_section) for _ in range(section)]
        self.frequency = frequency.to(device)  # fp32 [D/2]
        self.axis = torch.tensor(axis, device=device)  # int64 [D/2]

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int32 [3, R] -> cos, sin fp32 [R, D/2], contiguous (kernels read whole rows)."""
        angle = positions.T.index_select(1, self.axis).float() * self.frequency
        return angle.cos(), angle.sin()
