"""The language model over batches of whole prompts in dense tensors, with any token fresh or cached in any layer.

For evaluation only: it computes what the engine computes (a test compares them), but for many prompts at once, with
recompute sets that the engine has no use for, and it hands out what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from vlcache_dist import kernels
from vlcache_dist.model.language import LanguageModel


@dataclass(slots=True)
class DenseCache:
    """``k`` (rotated) and ``v``: [layer, B, S + 1, kv_head, head_dim]. Row S is where padding goes; nobody reads it."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def length(self) -> int:
        return self.k.shape[2] - 1

    def clone(self) -> DenseCache:
        return DenseCache(self.k.clone(), self.v.clone())


@dataclass(slots=True)
class Captured:
    """Unrotated K and V of some rows in all layers: [layer, B, M, kv_head, head_dim]."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(slots=True)
class Shift:
    """One reused picture of case ``case`` whose cached tokens follow its probes: in every layer the mean of fresh minus
    cached K (unrotated) and V of rows ``probes`` (int64 [p], of the rows that run) is added to what lies at cache rows
    ``stale`` int64 [s], whose positions are ``positions`` int [3, s]. ``k``, ``v``: the probes' cached ones, [layer, p,
    kv_head, head_dim]."""

    case: int
    probes: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    stale: torch.Tensor
    positions: torch.Tensor


@dataclass(slots=True)
class Resume:
    """Rows ``rows`` bool [B, R] enter layer ``layer`` with the hidden states ``x`` [B, R, C] instead of what the layers
    below made of them."""

    layer: int
    rows: torch.Tensor
    x: torch.Tensor


@dataclass(slots=True)
class Attention:
    """The attention that row ``rows[b]`` (int64 [B], of the rows that run) of each case pays to the cache's rows, mean
    over heads. ``run`` appends fp32 [B, keys] per layer to ``layers``."""

    rows: torch.Tensor
    layers: list[torch.Tensor] = field(default_factory=list)


class DenseModel:
    """``language`` in fp32 on CPU, or in any dtype on a GPU. Stateless."""

    def __init__(self, language: LanguageModel) -> None:
        self.language = language
        self.config = language.config

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def new_cache(self, batch: int, length: int) -> DenseCache:
        shape = (self.num_layers, batch, length + 1, self.config.num_kv_heads, self.config.head_dim)
        return DenseCache(*(torch.zeros(shape, dtype=self.language.dtype, device=self.language.device) for _ in "kv"))

    def rotate(self, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """k [B, R, heads, D] to positions int [3, B, R]."""
        flat = k.reshape(-1, *k.shape[2:])
        cos, sin = self.language.rope(positions.reshape(3, -1))
        return kernels.rotate(flat, cos, sin).view(k.shape)

    def fill(self, cache: DenseCache, index: torch.Tensor, kept: Captured, positions: torch.Tensor) -> None:
        """Put recorded tokens at cache rows ``index`` int64 [B, M], K rotated to ``positions`` int [3, B, M]."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        for n in range(self.num_layers):
            cache.k[n, rows, index] = self.rotate(kept.k[n], positions)
            cache.v[n, rows, index] = kept.v[n]

    @torch.inference_mode()
    def run(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        positions: torch.Tensor,
        cache: DenseCache,
        fresh: torch.Tensor | None = None,
        capture: torch.Tensor | None = None,
        shifts: Sequence[Shift] = (),
        attention: Attention | None = None,
        resume: Resume | None = None,
        below: int | None = None,
    ) -> tuple[torch.Tensor, Captured | None]:
        """Rows x [B, R, C] at cache rows ``index`` int64 [B, R] (S for padding) through all layers; returns hidden
        states [B, R, C] before the last norm. ``fresh`` bool [layer, B, R]: whether the layer's K and V of the row
        replace what the cache has (None: always). ``capture`` int64 [B, M]: rows whose K and V are returned.
        ``shifts``: corrections of cached tokens, applied to ``cache`` layer by layer before the layer attends.
        ``attention``: is filled where given. ``below``: the states before this layer are wanted, and no layers from it
        on."""
        batch, rows = index.shape
        length, config = cache.length, self.config
        d, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        cos, sin = self.language.rope(positions.reshape(3, -1))
        each = torch.arange(batch, device=index.device)[:, None]
        keys = int(index[index < length].max()) + 1
        mask = torch.arange(keys, device=index.device)[None, None, None] <= index[:, None, :, None]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for n, layer in enumerate(self.language.layers[:below]):
            if resume is not None and n == resume.layer:
                x = torch.where(resume.rows[..., None], resume.x, x)
            h = kernels.rms_norm(x.reshape(-1, x.shape[-1]), layer.input_norm, config.rms_norm_eps)
            q, k, v = F.linear(h, layer.qkv, layer.qkv_bias).split((heads * d, kv_heads * d, kv_heads * d), -1)
            q, k, v = q.unflatten(-1, (-1, d)), k.unflatten(-1, (-1, d)), v.view(batch, rows, kv_heads, d)
            if capture is not None:
                seen.append((k.view(batch, rows, kv_heads, d)[each, capture], v[each, capture]))
            for shift in shifts:
                self._shift(n, shift, k.view(batch, rows, kv_heads, d), v, cache)
            q, k = kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin).view(batch, rows, kv_heads, d)
            where = index if fresh is None else torch.where(fresh[n], index, length)
            cache.k[n, each, where] = k
            cache.v[n, each, where] = v
            queries, old_k, old_v = (
                q.view(batch, rows, heads, d).transpose(1, 2),
                cache.k[n, :, :keys].transpose(1, 2).repeat_interleave(heads // kv_heads, 1),
                cache.v[n, :, :keys].transpose(1, 2).repeat_interleave(heads // kv_heads, 1),
            )
            attended = F.scaled_dot_product_attention(queries, old_k, old_v, attn_mask=mask)
            if attention is not None:
                one = queries[each[:, 0], :, attention.rows, None].float() @ old_k.float().transpose(2, 3) / d**0.5
                allowed = mask[each[:, 0], :, attention.rows, None]
                attention.layers.append(one.masked_fill(~allowed, -torch.inf).softmax(-1).mean((1, 2)))
            x = x + F.linear(attended.transpose(1, 2).reshape(batch, rows, heads * d), layer.o)
            h = kernels.rms_norm(x.reshape(-1, x.shape[-1]), layer.post_norm, config.rms_norm_eps).view(x.shape)
            x = x + F.linear(kernels.silu_mul(F.linear(h, layer.gate_up).flatten(0, 1)), layer.down).view(x.shape)
        if capture is None:
            return x, None
        if not seen:
            nothing = x.new_empty((0, *capture.shape, kv_heads, d))
            return x, Captured(nothing, nothing.clone())
        return x, Captured(*(torch.stack(part) for part in zip(*seen, strict=True)))

    def _shift(self, n: int, shift: Shift, k: torch.Tensor, v: torch.Tensor, cache: DenseCache) -> None:
        b = shift.case
        dk = (k[b, shift.probes] - shift.k[n]).mean(0).expand(len(shift.stale), -1, -1)
        cache.k[n, b, shift.stale] += self.rotate(dk[None].contiguous(), shift.positions[:, None])[0]
        cache.v[n, b, shift.stale] += (v[b, shift.probes] - shift.v[n]).mean(0)

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C] -> fp32 [B, vocab]."""
        return self.language.logits(x)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., C]."""
        return F.embedding(token_ids, self.language.embed_tokens)
