"""The language model: active rows through the layers, over paged KV (``model.batch``: rows, depth, segments)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlcache_dist import kernels
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.config import TextConfig
from vlcache_dist.model.rope import MRope


@dataclass(slots=True)
class DecoderLayer:
    """C hidden, I intermediate. ``qkv`` is [(Hq + 2 Hkv) D, C] with Q, K, V in this order; ``o`` is [C, Hq D],
    ``gate_up`` [2I, C]."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class LanguageModel:
    """Weights are uninitialized until ``model.weights`` fills them through ``parameters``; ``lm_head`` is the embedding
    itself where they are tied. Nothing here synchronizes with the host."""

    def __init__(self, config: TextConfig, tied: bool, device: torch.device | str, dtype: torch.dtype) -> None:
        def new(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        c, i, d = config.hidden_size, config.intermediate_size, config.head_dim
        q = config.num_heads * d
        qkv = q + 2 * config.num_kv_heads * d
        self.config, self.tied, self.device, self.dtype = config, tied, torch.device(device), dtype
        self.embed_tokens = new(config.vocab_size, c)
        self.layers = [
            DecoderLayer(
                input_norm=new(c),
                qkv=new(qkv, c),
                qkv_bias=new(qkv),
                o=new(c, q),
                post_norm=new(c),
                gate_up=new(2 * i, c),
                down=new(c, i),
            )
            for _ in range(config.num_layers)
        ]
        self.norm = new(c)
        self.lm_head = self.embed_tokens if tied else new(config.vocab_size, c)
        self.rope = MRope(config, device)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> the (view of a) tensor that it fills, in the checkpoint's shape."""
        prefix = "model.language_model."
        q, kv = self.config.num_heads * self.config.head_dim, self.config.num_kv_heads * self.config.head_dim
        named = {prefix + "embed_tokens.weight": self.embed_tokens, prefix + "norm.weight": self.norm}
        if not self.tied:
            named["lm_head.weight"] = self.lm_head
        for n, layer in enumerate(self.layers):
            here = f"{prefix}layers.{n}."
            for letter, weight, bias in zip(
                "qkv",
                layer.qkv.split((q, kv, kv)),
                layer.qkv_bias.split((q, kv, kv)),
                strict=True,
            ):
                named[f"{here}self_attn.{letter}_proj.weight"] = weight
                named[f"{here}self_attn.{letter}_proj.bias"] = bias
            gate, up = layer.gate_up.chunk(2)
            named |= {
                here + "self_attn.o_proj.weight": layer.o,
                here + "mlp.gate_proj.weight": gate,
                here + "mlp.up_proj.weight": up,
                here + "mlp.down_proj.weight": layer.down,
                here + "input_layernorm.weight": layer.input_norm,
                here + "post_attention_layernorm.weight": layer.post_norm,
            }
        return named

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, pages: torch.Tensor, arena: torch.Tensor | None, scatter: ScatterBatch | None
    ) -> torch.Tensor:
        """Write the reused tokens and the batch's K and V into ``pages`` [L, 2, NB, BS, Hkv, D] (and what is recorded
        into ``arena``), and return logits fp32 [num_samples, vocab]. ``arena`` may be None if nothing refers to it."""
        if scatter is not None:
            self.scatter(scatter, pages, arena, 0, self.config.num_layers)
        x = self.run_layers(self.embed(batch, arena), batch, pages, arena, 0, self.config.num_layers)
        return self.logits(x)

    @torch.inference_mode()
    def scatter(
        self, scatter: ScatterBatch, pages: torch.Tensor, arena: torch.Tensor | None, start: int, stop: int
    ) -> None:
        """Copy reused tokens from their extents into the pages of layers [start, stop), K rotated on the way. It must
        precede ``run_layers`` of the same layers: rows that are recomputed overwrite what was copied."""
        if arena is None:
            raise ValueError("reused tokens need an arena")
        cos, sin = self.rope(scatter.positions)
        kernels.rotate_scatter(
            arena, pages, scatter.src_base, scatter.span_tokens, scatter.slots, cos, sin, start, stop
        )

    @torch.inference_mode()
    def embed(self, batch: ForwardBatch, arena: torch.Tensor | None) -> torch.Tensor:
        """Hidden state [R, C] before layer 0: token embeddings, and encoder output from the arena for vision tokens."""
        x = F.embedding(batch.token_ids, self.embed_tokens)
        if len(batch.embed_rows):
            if arena is None:
                raise ValueError("vision tokens need an arena")
            every_row = arena.unfold(0, x.shape[1], 1)  # a view: row i starts at element i
            x[batch.embed_rows] = every_row[batch.embed_offset].to(x.dtype)
        return x

    @torch.inference_mode()
    def run_layers(
        self,
        x: torch.Tensor,
        batch: ForwardBatch,
        pages: torch.Tensor,
        arena: torch.Tensor | None,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Layers [start, stop): x [rows_kv[start], C] -> [rows_q[stop - 1], C]. Writes K and V of every row it sees
        to the pages. Passing a result on to the next range of layers continues exactly where it stopped."""
        cos, sin = self.rope(batch.positions)
        record = arena if batch.any_record else None
        eps = self.config.rms_norm_eps
        pending: torch.Tensor | None = None  # the previous MLP's output, not yet added to x
        for n in range(start, stop):
            layer, rows = self.layers[n], batch.rows_q[n]
            if pending is None:
                h = kernels.rms_norm(x, layer.input_norm, eps)
            else:
                h, x = kernels.add_rms_norm(pending, x, layer.input_norm, eps)
            h = self._attention(h, layer, n, batch, pages, record, cos, sin)
            x = x[:rows]
            if rows == 0:
                return x
            h, x = kernels.add_rms_norm(h, x, layer.post_norm, eps)
            pending = self.reduce(kernels.linear(kernels.swiglu(h, layer.gate_up), layer.down))
        return x if pending is None else x + pending

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, C] after the last layer -> next-token logits fp32 [n, vocab]."""
        return F.linear(kernels.rms_norm(x, self.norm, self.config.rms_norm_eps), self.lm_head).float()

    @torch.inference_mode()
    def queries(self, x: torch.Tensor, n: int, batch: ForwardBatch) -> torch.Tensor:
        """Rotated queries [rows, heads of this model, D] of layer ``n`` for hidden states x [rows, C] before it."""
        layer = self.layers[n]
        h = kernels.rms_norm(x, layer.input_norm, self.config.rms_norm_eps)
        q, _, _ = self._project(h, layer, len(h))
        cos, sin = self.rope(batch.positions)
        return kernels.rotate(q.contiguous(), cos[: len(x)], sin[: len(x)])

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """What the attention's and the MLP's output projection made of this model's heads and features [rows, C], to
        the sum over all: the identity, except in a shard (``model.parallel``), where it may work in place."""
        return partial

    def _attention(
        self,
        h: torch.Tensor,
        layer: DecoderLayer,
        n: int,
        batch: ForwardBatch,
        pages: torch.Tensor,
        record: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """h [rows_kv, C], normalized -> attention output [rows_q, C]. K and V of all rows are written first."""
        rows_kv, rows, segs = batch.rows_kv[n], batch.rows_q[n], batch.segs_q[n]
        k_pages, v_pages = pages[n, 0], pages[n, 1]
        q, k, v = self._project(h, layer, rows)
        cos, sin = cos[:rows_kv], sin[:rows_kv]
        slots, base, tokens = batch.slots[:rows_kv], batch.record_base[:rows_kv], batch.record_tokens[:rows_kv]
        if rows == 0:
            kernels.write_kv(k, v, cos, sin, k_pages, v_pages, slots, record, base, tokens, n)
            return h[:0]
        q = kernels.rotate_and_write(q, k, v, cos, sin, k_pages, v_pages, slots, record, base, tokens, n)
        attended = self._attend(q, n, segs, batch, k_pages, v_pages)
        return self.reduce(kernels.linear(attended.reshape(rows, -1), layer.o))

    def _attend(
        self, q: torch.Tensor, n: int, segs: int, batch: ForwardBatch, k_pages: torch.Tensor, v_pages: torch.Tensor
    ) -> torch.Tensor:
        """q [rows_q[n], Hq, D] over the pages of layer n; near rows in a call of their own."""
        rows, far, first = len(q), batch.far_rows, batch.far_segs
        scale, kv_len, table = self.config.head_dim**-0.5, batch.kv_len[:segs], batch.block_table[:segs]
        if rows <= far:
            cu, max_q = batch.cu_q[: segs + 1], batch.max_q[n]
            return kernels.segment_attention(
                q, k_pages, v_pages, cu, kv_len, table, max_q, batch.max_kv, scale, None, batch.settled
            )
        out = torch.empty_like(q)
        kernels.segment_attention(
            q[:far], k_pages, v_pages, batch.cu_q[: first + 1], kv_len[:first], table[:first],
            batch.far_max_q, batch.max_kv, scale, out[:far],
        )  # fmt: skip
        kernels.segment_attention(
            q[far:], k_pages, v_pages, batch.near_cu[: segs - first + 1], kv_len[first:], table[first:],
            batch.near_max_q, batch.near_max_kv, scale, out[far:],
        )  # fmt: skip
        return out

    def _project(
        self, h: torch.Tensor, layer: DecoderLayer, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of the first ``rows`` rows, keys and values of all: [*, heads, D] each."""
        dim, kv_heads = self.config.head_dim, self.config.num_kv_heads
        width = self.config.num_heads * dim
        if rows == len(h):
            q, kv = kernels.linear(h, layer.qkv, layer.qkv_bias).split((width, 2 * kv_heads * dim), -1)
        else:
            q = kernels.linear(h[:rows], layer.qkv[:width], layer.qkv_bias[:width])
            kv = kernels.linear(h, layer.qkv[width:], layer.qkv_bias[width:])
        k, v = kv.unflatten(-1, (2, kv_heads, dim)).unbind(1)
        return q.unflatten(-1, (-1, dim)), k, v
