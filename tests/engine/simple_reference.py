"""Vision-KV reuse for one prompt, written as plainly as it can be: dense tensors, one token after the other, no pages,
no segments, no batching. It shares nothing with the engine but the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vlcache_dist.model.language import LanguageModel


@dataclass
class Computed:
    """``k`` unrotated, ``k_rotated`` and ``v``: [layer, token, kv_head, head_dim]; ``logprobs`` [vocab] of the next
    token; ``computed[l]``: the tokens whose K and V layer l computed."""

    k: torch.Tensor
    k_rotated: torch.Tensor
    v: torch.Tensor
    logprobs: torch.Tensor
    computed: list[set[int]]


def prefill(
    model: LanguageModel,
    token_ids: list[int],
    positions: np.ndarray,
    embeddings: dict[int, torch.Tensor],
    recompute: dict[int, list[bool]] | None = None,
    cached: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Computed:
    """Compute a prompt. ``positions`` [3, n]; ``embeddings``: encoder output per vision token position.

    ``recompute[i][l]``: whether reused token i is computed in layer l (never again after a layer where it is not);
    ``cached[i]``: its unrotated K and V [layer, kv_head, head_dim]. Tokens not named there are computed everywhere.
    """
    recompute, cached = recompute or {}, cached or {}
    config = model.config
    n, layers, dim = len(token_ids), config.num_layers, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    k = torch.zeros(layers, n, kv_heads, dim)
    k_rotated, v = torch.zeros_like(k), torch.zeros_like(k)
    computed: list[set[int]] = []
    hidden = {i: embeddings.get(i, model.embed_tokens[token]).clone() for i, token in enumerate(token_ids)}
    for number, layer in enumerate(model.layers):
        w_q, w_k, w_v = layer.qkv.split((heads * dim, kv_heads * dim, kv_heads * dim))
        b_q, b_k, b_v = layer.qkv_bias.split((heads * dim, kv_heads * dim, kv_heads * dim))
        here = {i for i in range(n) if i not in recompute or recompute[i][number]}
        computed.append(here)
        normed = {}
        for i in range(n):
            if i in here:
                normed[i] = _norm(hidden[i], layer.input_norm, config.rms_norm_eps)
                k[number, i] = (w_k @ normed[i] + b_k).view(kv_heads, dim)
                v[number, i] = (w_v @ normed[i] + b_v).view(kv_heads, dim)
            else:
                k[number, i], v[number, i] = cached[i][0][number], cached[i][1][number]
            k_rotated[number, i] = _rotate(k[number, i], positions[:, i], model)
        following = {}
        for i in sorted(here):
            q = _rotate((w_q @ normed[i] + b_q).view(heads, dim), positions[:, i], model)
            out = torch.zeros(heads, dim)
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = k_rotated[number, : i + 1, group] @ q[head] / dim**0.5
                out[head] = torch.softmax(scores, 0) @ v[number, : i + 1, group]
            x = hidden[i] + layer.o @ out.reshape(-1)
            gate, up = (layer.gate_up @ _norm(x, layer.post_norm, config.rms_norm_eps)).chunk(2)
            following[i] = x + layer.down @ (gate * torch.sigmoid(gate) * up)
        hidden = following
    logits = model.lm_head @ _norm(hidden[n - 1], model.norm, config.rms_norm_eps)
    return Computed(k, k_rotated, v, torch.log_softmax(logits, 0), computed)


def positions_of(parts: list[tuple[int, tuple[int, int, int] | None]], tokens_per_second: float = 0.0) -> np.ndarray:
    """M-RoPE positions [3, n] of a prompt of text runs (length, None) and pictures (length, (t, h, w) after merging).
    ``tokens_per_second`` times the seconds per temporal patch is a video's step on the t axis."""
    columns: list[tuple[int, int, int]] = []
    position = 0
    for length, grid in parts:
        if grid is None:
            columns += [(position + i,) * 3 for i in range(length)]
            position += length
            continue
        t, h, w = grid
        step = tokens_per_second if t > 1 else 1
        for frame in range(t):
            columns += [
                (position + int(frame * step), position + row, position + column)
                for row in range(h)
                for column in range(w)
            ]
        position += max(h, w)
    return np.array(columns).T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def _rotate(x: torch.Tensor, position: np.ndarray, model: LanguageModel) -> torch.Tensor:
    """x [heads, dim] at one (t, h, w)."""
    half = x.shape[-1] // 2
    axes = [axis % 3 for axis, count in enumerate(model.config.mrope_section) for _ in range(count)]
    out = torch.empty_like(x)
    for f in range(half):
        angle = torch.tensor(float(position[axes[f]]) / model.config.rope_theta ** (2 * f / x.shape[-1]))
        a, b = x[:, f], x[:, f + half]
        out[:, f] = a * torch.cos(angle) - b * torch.sin(angle)
        out[:, f + half] = b * torch.cos(angle) + a * torch.sin(angle)
    return out
