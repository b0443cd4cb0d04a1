"""Attention in torch: over paged keys (``segment_attention``) and over packed sequences (``varlen_attention``).

These are the definitions that every backend in ``kernels.backends`` is tested against, and what runs on CPU.
They read lengths on the host, so they cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F

_KV_BUCKET = 256  # segments of equal query length are padded together when their key counts are this close


def segment_attention_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    max_q: int,
    max_kv: int,
    scale: float,
    out: torch.Tensor | None = None,
    settled: bool = False,
) -> torch.Tensor:
    """Causal attention of S segments over paged keys, bottom-right aligned.

    q [R, Hq, D]; k_pages, v_pages [NB, BS, Hkv, D]; cu_q int32 [S+1]; kv_len int32 [S]; block_table int32 [S, B].
    Segment s owns rows [cu_q[s], cu_q[s+1]) and sees keys [0, kv_len[s]) of block_table[s]; its row i sees keys
    j <= kv_len[s] - q_len[s] + i. Returns [R, Hq, D] in q's dtype; rows at or past cu_q[S] are zero here and
    unspecified on other backends. max_q and max_kv bound the segments and are not read here. ``out``
    [R, Hq, D], contiguous: where the result goes, and what is returned. ``settled``: of a segment's keys only the last
    q_len may be written by kernels that are still under way when this one is launched; not read here.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    out.zero_()
    bounds, lengths = cu_q.tolist(), kv_len.tolist()
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for s, keys in enumerate(lengths):
        queries = bounds[s + 1] - bounds[s]
        if queries > 0:
            groups[queries, -(-keys // _KV_BUCKET)].append(s)
    for (queries, _), members in groups.items():
        keys = max(lengths[s] for s in members)
        rows = torch.tensor([bounds[s] for s in members], device=q.device)[:, None] + torch.arange(
            queries, device=q.device
        )
        part = torch.tensor([lengths[s] for s in members], device=q.device)
        tables = block_table[members]
        out[rows] = _dense_group(q[rows], k_pages, v_pages, tables, part, queries, keys, scale)
    return out


def _dense_group(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    tables: torch.Tensor,
    kv_len: torch.Tensor,
    queries: int,
    keys: int,
    scale: float,
) -> torch.Tensor:
    """q [G, queries, Hq, D] of G segments with at most ``keys`` keys each -> [G, queries, Hq, D]."""
    block_size = k_pages.shape[1]
    position = torch.arange(keys, device=q.device)
    slots = tables[:, position // block_size].long() * block_size + position % block_size
    k = k_pages.reshape(-1, *k_pages.shape[2:])[slots].transpose(1, 2)  # [G, Hkv, keys, D]
    v = v_pages.reshape(-1, *v_pages.shape[2:])[slots].transpose(1, 2)
    if int(kv_len.min()) < keys:  # what lies past a segment's keys may be anything, NaN included
        beyond = (position >= kv_len[:, None])[:, None, :, None]
        k, v = k.masked_fill(beyond, 0), v.masked_fill(beyond, 0)
    group, _, heads, dim = q.shape
    ratio = heads // k.shape[1]
    if queries == keys and len(kv_len) == 1:
        k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, scale=scale).transpose(1, 2)
    last = kv_len[:, None] - queries + torch.arange(queries, device=q.device)  # [G, queries]
    mask = (position <= last[:, :, None])[:, None].repeat(1, 1, ratio, 1)  # [G, 1, ratio * queries, keys]
    folded = q.view(group, queries, -1, ratio, dim).permute(0, 2, 3, 1, 4).reshape(group, -1, ratio * queries, dim)
    done = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    return done.view(group, -1, ratio, queries, dim).permute(0, 3, 1, 2, 4).reshape(group, queries, heads, dim)


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu: torch.Tensor,
    max_len: int,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Self-attention inside packed sequences. q [N, Hq, D], k and v [N, Hkv, D], cu int32 [S+1] -> [N, Hq, D].

    ``scale`` defaults to D**-0.5. max_len bounds the sequences and is not read here.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    bounds = cu.tolist()
    ratio = q.shape[1] // k.shape[1]
    groups: dict[int, list[int]] = defaultdict(list)
    for a, b in pairwise(bounds):
        if b > a:
            groups[b - a].append(a)
    for length, starts in groups.items():
        rows = torch.tensor(starts, device=q.device)[:, None] + torch.arange(length, device=q.device)
        qs, ks, vs = (x[rows].transpose(1, 2) for x in (q, k, v))
        if ratio > 1:
            ks, vs = ks.repeat_interleave(ratio, 1), vs.repeat_interleave(ratio, 1)
        out[rows] = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale).transpose(1, 2)
    return out
