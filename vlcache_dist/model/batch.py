"""What one forward pass of the language model computes, as tensors on the model's device.

A *row* is one token of one sequence that is computed in this pass. Its *depth* is the number of layers whose K and V
it computes: ``num_layers`` for text and fresh vision tokens, fewer for a vision token that is recomputed in the
lower layers only, ``num_layers + 1`` for a row whose next-token logits are wanted. Rows are sorted by depth,
deepest first, so at layer ``l``

* rows ``[:rows_kv[l]]``  (depth > l)      compute K and V,
* rows ``[:rows_q[l]]``   (depth > l + 1)  compute query, attention, output projection and MLP:

a row's deepest layer needs its K and V only (attention skip, MLP skip), and in the last layer only sampled rows go
on. No gather is ever needed: the set shrinks from the end.

A *segment* is a run of rows of equal depth at consecutive positions [a, b) of one sequence: a causal sub-sequence
whose keys are positions [0, b) of that sequence's block table (bottom-right aligned). Segments are in row order, so
layer ``l`` attends over segments ``[:segs_q[l]]``. K and V of all rows of a layer are written to the pages before
any of them is read.

Attention splits keys over processors where few queries face many keys. A warm prefill has both: a little text that sees
the whole prompt, and image tokens that see its beginning. So rows ``[:far_rows]``, sampled ones and those that see the
most keys, are attended in one call and the rest in another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlcache_dist.model.upload import upload

if TYPE_CHECKING:
    from vlcache_dist.engine.batch import StepBatch


@dataclass(slots=True)
class ForwardBatch:
    """R rows, S segments, E rows with an encoder embedding, B blocks in the longest block table.

    ``record_base``: arena element offset of layer 0's K row of the token being recorded, -1 where the row is not
    recorded; K of layer l is at ``record_base + 2*l*n*kv_row``, V at ``record_base + (2*l+1)*n*kv_row`` with
    ``n = record_tokens`` (the span's length). ``embed_offset``: arena element offset of the row's embedding.
    """

    token_ids: torch.Tensor  # int64 [R]
    positions: torch.Tensor  # int32 [3, R]  M-RoPE (t, h, w)
    slots: torch.Tensor  # int64 [R]  block * block_size + offset
    embed_rows: torch.Tensor  # int64 [E]
    embed_offset: torch.Tensor  # int64 [E]
    record_base: torch.Tensor  # int64 [R]
    record_tokens: torch.Tensor  # int64 [R]
    cu_q: torch.Tensor  # int32 [S + 1]
    kv_len: torch.Tensor  # int32 [S]
    block_table: torch.Tensor  # int32 [S, B]
    rows_kv: tuple[int, ...]  # per layer
    rows_q: tuple[int, ...]
    segs_q: tuple[int, ...]
    max_q: tuple[int, ...]  # longest segment among segs_q[l], 0 if none
    max_kv: int
    far_rows: int  # all where there is one group
    far_segs: int
    far_max_q: int
    near_cu: torch.Tensor  # int32 [S - far_segs + 1], from row far_rows on
    near_max_q: int
    near_max_kv: int
    num_samples: int  # rows [:num_samples] are sampled, in the order of the step's sequences
    any_record: bool
    settled: bool  # a row of each sequence, nothing scattered: every other key was written by an earlier pass

    @classmethod
    def from_step(cls, step: StepBatch, device: torch.device | str) -> ForwardBatch:
        """The tensors of a step on the model's device; on CUDA one asynchronous copy, no synchronization."""
        lengths = np.diff(step.cu_q)
        (
            token_ids,
            positions,
            slots,
            embed_rows,
            embed_offset,
            record_base,
            record_tokens,
            cu_q,
            kv_len,
            block_table,
            near_cu,
        ) = upload(
            [
                step.token_ids,
                step.positions,
                step.slots,
                step.embed_rows,
                step.embed_offset,
                step.record_base,
                step.record_tokens,
                step.cu_q,
                step.kv_len,
                step.block_table,
                step.cu_q[step.far_segs :] - step.far_rows,
            ],
            device,
        )
        return cls(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            embed_rows=embed_rows,
            embed_offset=embed_offset,
            record_base=record_base,
            record_tokens=record_tokens,
            cu_q=cu_q,
            kv_len=kv_len,
            block_table=block_table,
            rows_kv=step.rows_kv,
            rows_q=step.rows_q,
            segs_q=step.segs_q,
            max_q=step.max_q,
            max_kv=step.max_kv,
            far_rows=step.far_rows,
            far_segs=step.far_segs,
            far_max_q=int(lengths[: step.far_segs].max(initial=0)),
            near_cu=near_cu,
            near_max_q=int(lengths[step.far_segs :].max(initial=0)),
            near_max_kv=int(step.kv_len[step.far_segs :].max(initial=0)),
            num_samples=step.num_samples,
            any_record=bool((step.record_base >= 0).any()),
            settled=bool(step.num_samples == len(step.token_ids) and not len(step.scatter_src)),
        )


@dataclass(slots=True)
class ScatterBatch:
    """N reused vision tokens that are written to the pages before the pass: K rotated to ``positions``, V as is.

    ``src_base`` and ``span_tokens`` address the KV extent as ``record_base`` and ``record_tokens`` do above.
    """

    src_base: torch.Tensor  # int64 [N]
    span_tokens: torch.Tensor  # int64 [N]
    slots: torch.Tensor  # int64 [N]
    positions: torch.Tensor  # int32 [3, N]

    @classmethod
    def from_step(cls, step: StepBatch, device: torch.device | str) -> ScatterBatch | None:
        """The reused tokens of a step on the model's device; None if there are none."""
        if not len(step.scatter_src):
            return None
        return cls(*upload((step.scatter_src, step.scatter_tokens, step.scatter_slots, step.scatter_positions), device))
