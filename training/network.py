"""Qwen2.5-VL's forward pass as training wants it: functional, batched, differentiable, on the parameters of
transformers' model. What it computes equals transformers' model (a test compares them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from training.batches import PAD, Batch, sprite_names
from vlcache_dist.demo.pictures import CELL, NOISE, mask

TAP = 3  #: the layer whose hidden states an auxiliary reader of places sees
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Weights = dict[str, torch.Tensor]


def atlas() -> torch.Tensor:
    """Every sprite's ink, uint8 [sprites, 72, 72]."""
    out = np.zeros((len(sprite_names()), 2 * CELL + 2 * PAD, 2 * CELL + 2 * PAD), np.uint8)
    for number, name in enumerate(sprite_names()):
        if name:
            ink = mask(name)
            out[number, PAD : PAD + len(ink), PAD : PAD + len(ink)] = ink
    return torch.from_numpy(out)


def paint(cells: torch.Tensor, sprites: torch.Tensor, noise: bool = True) -> torch.Tensor:
    """Cells int16 [N, 9] -> normalized patches fp32 [N * 4, 588], one temporal copy, in the processor's order."""
    c = cells.long()
    line = torch.arange(CELL, device=c.device)
    rows, columns = c[:, 1, None, None] + line[None, :, None], c[:, 2, None, None] + line[None, None, :]
    ink = sprites[c[:, 0, None, None], rows, columns].float()[:, None] / 255
    front, back = c[:, 3:6, None, None].float(), c[:, 6:9, None, None].float()
    image = back + ink * (front - back)
    if noise:
        image = image + NOISE * torch.randn_like(image)
    image = image.clamp(0, 255).round() / 255
    mean, std = _constant(MEAN, c.device)[:, None, None], _constant(STD, c.device)[:, None, None]
    patches = ((image - mean) / std).view(len(c), 3, 2, 14, 2, 14)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(len(c) * 4, 588)


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Kept on the device: nothing is sent there while a CUDA graph is captured."""
    return torch.tensor(values, device=device)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


@lru_cache(maxsize=256)
def _windows(
    rows: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, int]:
    """For a grid of merged tokens cut into windows of 4 x 4: ``order`` int64 [W * 16], the token at each place (places
    outside the picture repeat token 0); ``inside`` bool [W * 16], None if all are; ``back`` int64 [rows * columns]:
    each token's place; W."""
    height, width = -(-rows // 4), -(-columns // 4)
    grid = np.full((height * 4, width * 4), -1)
    grid[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    order = grid.reshape(height, 4, width, 4).transpose(0, 2, 1, 3).reshape(-1)
    back = np.argsort(np.where(order < 0, rows * columns, order), kind="stable")[: rows * columns]
    inside = None if (order >= 0).all() else torch.from_numpy(order >= 0).to(device)
    return torch.from_numpy(order.clip(0)).to(device), inside, torch.from_numpy(back).to(device), height * width


def see(
    config: Any,
    w: Weights,
    cells: torch.Tensor,
    sprites: torch.Tensor,
    grid: tuple[int, int],
    blocks: Blocks,
    noise: bool,
) -> torch.Tensor:
    """The vision tower over pictures of one size: cells [B, rows * columns, 9] -> [B, rows * columns, out_hidden].
    Pictures are painted window by window, so that only the results are put in order."""
    heads, width, images = config.num_heads, config.hidden_size, len(cells)
    order, inside, back, windows = _windows(*grid, cells.device)
    patches = blocks.paint(cells.index_select(1, order).flatten(0, 1), sprites, noise)
    weight = w["patch_embed.proj.weight"]
    folded = weight.float().sum(2).reshape(width, -1)  # both temporal copies are the same
    x = F.linear(patches, folded).to(weight.dtype).view(images, -1, width)
    cos, sin = _vision_angles(*grid, width // heads, cells.device)
    keys = None if inside is None else inside.repeat_interleave(4)
    for n in range(config.depth):
        groups = 1 if n in config.fullatt_block_indexes else windows
        seen = None if keys is None else keys.view(groups, 1, 1, -1).repeat(images, 1, 1, 1)
        x = blocks.vision(x, _part(w, f"blocks.{n}."), cos, sin, seen, groups, heads)
    x = rms_norm(x, w["merger.ln_q.weight"]).reshape(images, -1, 4 * width).index_select(1, back)
    x = F.gelu(F.linear(x, w["merger.mlp.0.weight"], w["merger.mlp.0.bias"]))
    return F.linear(x, w["merger.mlp.2.weight"], w["merger.mlp.2.bias"])


def vision_block(
    x: torch.Tensor,
    w: Weights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seen: torch.Tensor | None,
    groups: int,
    heads: int,
) -> torch.Tensor:
    """One layer of the tower: x [images, patches, C] in ``groups`` windows that see only themselves; ``seen`` bool
    [images * groups, 1, 1, patches of a window] where some places are empty."""
    images, _, width = x.shape
    h = rms_norm(x, w["norm1.weight"])
    qkv = F.linear(h, w["attn.qkv.weight"], w["attn.qkv.bias"]).view(images, -1, 3, heads, width // heads)
    q, k, v = qkv.unbind(2)
    q, k = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype)
    q, k, v = (t.reshape(images * groups, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    a = a.transpose(1, 2).reshape(images, -1, width)
    x = x + F.linear(a, w["attn.proj.weight"], w["attn.proj.bias"])
    h = rms_norm(x, w["norm2.weight"])
    gate = F.linear(h, w["mlp.gate_proj.weight"], w["mlp.gate_proj.bias"])
    up = F.linear(h, w["mlp.up_proj.weight"], w["mlp.up_proj.bias"])
    return x + F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"], w["mlp.down_proj.bias"])


def _part(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


@lru_cache(maxsize=256)
def _vision_angles(
    rows: int, columns: int, dim: int, device: torch.device, theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin fp32 [1, patches, 1, dim] of the patches in window order: half of the angles by row, half by column."""
    order = _windows(rows, columns, device)[0]
    two = torch.arange(2, device=device)
    y = (2 * torch.arange(rows, device=device)[:, None, None, None] + two[:, None]).expand(rows, columns, 2, 2)
    x = (2 * torch.arange(columns, device=device)[:, None, None] + two).expand(rows, columns, 2, 2)
    frequency = theta ** -(torch.arange(0, dim // 2, 2, device=device, dtype=torch.float32) / (dim // 2))
    angles = torch.stack((y, x), -1).reshape(-1, 4, 2)[order].reshape(-1, 2, 1) * frequency
    angles = angles.flatten(1).repeat(1, 2)[None, :, None]
    return angles.cos(), angles.sin()


def read(
    config: Any, w: Weights, x: torch.Tensor, positions: torch.Tensor, blocks: Blocks
) -> tuple[torch.Tensor, torch.Tensor]:
    """The language model: embeddings [B, L, C], positions int64 [3, B, L] -> normalized hidden states [B, L, C], and
    those behind layer ``TAP``."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    cos, sin = _angles(config, config.hidden_size // heads, positions)
    early = x
    for n in range(config.num_hidden_layers):
        x = blocks.text(x, _part(w, f"layers.{n}."), cos, sin, heads // kv)
        early = x if n == TAP else early
    return rms_norm(x, w["norm.weight"]), early


def text_block(x: torch.Tensor, w: Weights, cos: torch.Tensor, sin: torch.Tensor, group: int) -> torch.Tensor:
    """One layer of the language model: x [B, L, C]; ``group``: query heads for each KV head."""
    batch, length, _ = x.shape
    h = rms_norm(x, w["input_layernorm.weight"])
    q, k, v = (
        F.linear(h, w[f"self_attn.{name}_proj.weight"], w[f"self_attn.{name}_proj.bias"])
        .view(batch, length, -1, cos.shape[-1])
        .transpose(1, 2)
        for name in "qkv"
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, -1)
    x = x + F.linear(a, w["self_attn.o_proj.weight"])
    h = rms_norm(x, w["post_attention_layernorm.weight"])
    inner = F.silu(F.linear(h, w["mlp.gate_proj.weight"])) * F.linear(h, w["mlp.up_proj.weight"])
    return x + F.linear(inner, w["mlp.down_proj.weight"])


@dataclass(frozen=True, slots=True)
class Blocks:
    """What most of the time goes into, as called from ``see``, ``read`` and ``forward``."""

    vision: Callable[..., torch.Tensor] = vision_block
    text: Callable[..., torch.Tensor] = text_block
    paint: Callable[..., torch.Tensor] = paint

    @classmethod
    def compiled(cls) -> Blocks:
        """The same, fused by torch.compile for any size (a GPU, and half a minute at the first steps)."""
        torch._dynamo.config.recompile_limit = 64
        return cls(*(torch.compile(f, dynamic=True) for f in (vision_block, text_block, paint)))


EAGER = Blocks()


def _angles(config: Any, dim: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin fp32 [B, 1, L, dim]; frequency i belongs to the axis of its M-RoPE section."""
    rope = config.rope_parameters
    frequency = rope["rope_theta"] ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    axes = [axis for axis, pairs in enumerate(rope["mrope_section"]) for _ in range(pairs)]
    angles = positions.float()[_constant(tuple(axes), positions.device)].permute(1, 2, 0) * frequency
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos(), angles.sin()


@dataclass(slots=True)
class Seen:
    """``logits`` fp32 [T, vocab] of the rows to learn; the pictures' ``tokens`` [V, C], slot by slot; and what the
    language model made of them by layer ``TAP``, ``early`` [V, C]."""

    logits: torch.Tensor
    tokens: torch.Tensor
    early: torch.Tensor


def forward(
    config: Any,
    vision: Weights,
    language: Weights,
    batch: Batch,
    sprites: torch.Tensor,
    *,
    noise: bool = True,
    blocks: Blocks = EAGER,
) -> Seen:
    """The whole model. The embedding may be of another dtype than the other weights: its gradient is summed by atomic
    operations, fast in fp32."""
    seen = [
        see(config.vision_config, vision, cells, sprites, grid, blocks, noise).flatten(0, 1)
        for cells, grid in zip(batch.cells, batch.grids, strict=True)
    ]
    tokens = torch.cat(seen)
    embedding = language["embed_tokens.weight"]
    x = embedding.index_select(0, batch.ids.flatten()).to(tokens.dtype)
    x = x.index_copy(0, batch.vision, tokens).view(*batch.ids.shape, -1)
    hidden, early = read(config.text_config, language, x, batch.positions, blocks)
    rows = hidden.flatten(0, 1).index_select(0, batch.learn)
    logits = F.linear(rows, embedding.to(rows.dtype)).float()
    return Seen(logits, tokens, early.flatten(0, 1).index_select(0, batch.vision))
