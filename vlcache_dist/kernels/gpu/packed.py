"""Full attention inside packed sequences, for the vision tower: no causal mask, as many key as query heads.

A head_dim that is no power of two is computed as the sum of two that are (80 = 64 + 16), because a padded 128 would
cost 60 % more arithmetic. Keys and values come by the bulk copy engine, whose last block of a sequence holds rows of
the next one: their scores are masked, but their values must be finite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
SEQUENCES = (64, 1024, 16384)  #: classes of sequence counts


def halves(head_dim: int) -> tuple[int, int] | None:
    """head_dim as one power of two >= 16 (and 0) or as the sum of two; None where it is neither."""
    first = 1 << (head_dim.bit_length() - 1)
    second = head_dim - first
    if first < 16 or second & (second - 1) or 0 < second < 16:
        return None
    return first, second


@triton.jit
def _blocks(
    acc1, acc2, m, l, q1, q2, k1_desc, k2_desc, v1_desc, v2_desc, row0, column, lo, hi, length, scale_log2,
    MASKED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offset = tl.arange(0, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_N):
        row = row0 + start
        s = tl.dot(q1, tl.trans(k1_desc.load([row, column])))
        if D2 > 0:
            s = tl.dot(q2, tl.trans(k2_desc.load([row, column + D1])), s)
        if MASKED:
            s = tl.where((start + offset < length)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        p = p.to(q1.dtype)
        acc1 = tl.dot(p, v1_desc.load([row, column]), acc1 * alpha[:, None])
        if D2 > 0:
            acc2 = tl.dot(p, v2_desc.load([row, column + D1]), acc2 * alpha[:, None])
        m = m_new
    return acc1, acc2, m, l


@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["cu_ptr"])
def _packed_kernel(
    q_ptr, k1_desc, k2_desc, v1_desc, v2_desc, out_ptr, cu_ptr, num_sequences, q_stride, scale_log2,
    HEADS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEQUENCES: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, heads); sequence s starts at tile ``cu[s] // BLOCK_M + s``."""
    D: tl.constexpr = D1 + D2
    tile = tl.program_id(0)
    head = tl.program_id(1)
    if ONE_TILE:
        sequence = tile
        first = 0
    else:
        every = tl.arange(0, SEQUENCES)
        begin = tl.load(cu_ptr + every, mask=every < num_sequences, other=2147483647).to(tl.int64)
        sequence = tl.sum((begin // BLOCK_M + every <= tile).to(tl.int32), 0) - 1
    row0 = tl.load(cu_ptr + sequence)
    length = tl.load(cu_ptr + sequence + 1) - row0
    if not ONE_TILE:
        first = (tile - (row0 // BLOCK_M + sequence)) * BLOCK_M
    if first >= length:
        return
    row = first + tl.arange(0, BLOCK_M)
    live = (row < length)[:, None]
    one = tl.arange(0, D1)[None, :]
    place = (row0 + row).to(tl.int64)[:, None] * q_stride + head * D
    q1 = tl.load(q_ptr + place + one, mask=live, other=0.0)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    q2 = q1
    acc2 = acc1
    if D2 > 0:
        two = D1 + tl.arange(0, D2)[None, :]
        q2 = tl.load(q_ptr + place + two, mask=live, other=0.0)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    m = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    clear = length // BLOCK_N * BLOCK_N
    acc1, acc2, m, l = _blocks(
        acc1, acc2, m, l, q1, q2, k1_desc, k2_desc, v1_desc, v2_desc, row0, head * D, 0, clear, length, scale_log2,
        False, D1, D2, BLOCK_N,
    )  # fmt: skip
    acc1, acc2, m, l = _blocks(
        acc1, acc2, m, l, q1, q2, k1_desc, k2_desc, v1_desc, v2_desc, row0, head * D, clear, length, length, scale_log2,
        True, D1, D2, BLOCK_N,
    )  # fmt: skip
    out = (row0 + row).to(tl.int64)[:, None] * (HEADS * D) + head * D
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + out + one, (acc1 / l[:, None]).to(kind), mask=live)
    if D2 > 0:
        tl.store(out_ptr + out + two, (acc2 / l[:, None]).to(kind), mask=live)


def _sequence_class(count: int) -> int:
    """A few classes of sequence counts, because each is compiled."""
    return next((size for size in SEQUENCES if size >= count), triton.next_power_of_2(count))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x [N, H, D] as the copy engine wants it: dense heads, rows and start on 16 bytes."""
    dense = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if dense and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, max_len: int, scale: float,
    block_m: int, block_n: int, warps: int, stages: int,
) -> torch.Tensor:  # fmt: skip
    """q, k, v [N, H, D] of a 16-bit dtype, ``halves(D)`` not None and H * D a multiple of 8; cu int32 [S+1]. Needs
    Hopper or later. ``stages`` is at least 2: with 1 the code that Triton 3.6 makes faults. Rows at or past cu[S] are
    left unwritten."""
    rows, heads, dim = q.shape
    parts = halves(dim)
    if parts is None or k.shape != q.shape:
        raise ValueError(f"packed_attention takes equal heads and head_dim of two powers of two, not {dim}")
    first, second = parts
    q, k, v = (_aligned(x) for x in (q, k, v))
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    sequences = len(cu) - 1
    if rows == 0 or sequences == 0:
        return out

    def source(x: torch.Tensor, width: int) -> TensorDescriptor:
        return TensorDescriptor(x, [rows, heads * dim], [x.stride(0), 1], [block_n, width])

    one_tile = max_len <= block_m
    tiles = sequences if one_tile else rows // block_m + sequences
    _packed_kernel[(tiles, heads)](
        q, source(k, first), source(k, second or first), source(v, first), source(v, second or first), out, cu,
        sequences, q.stride(0), scale * LOG2E, HEADS=heads, D1=first, D2=second, BLOCK_M=block_m, BLOCK_N=block_n,
        SEQUENCES=1 if one_tile else _sequence_class(sequences), ONE_TILE=one_tile, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out
