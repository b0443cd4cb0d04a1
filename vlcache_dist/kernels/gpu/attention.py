"""Variable-length attention over paged or packed keys (FlashAttention-2 with packed query heads and split keys).

A *tile* is BLOCK_M rows of one segment for one KV head. Its rows are (query, head) pairs of the ``Hq / Hkv`` query
heads that share that KV head, so that K and V are read once for all of them. The grid is

    (tiles, KV heads, splits)

where the number of tiles is bounded from shapes alone: segment s starts at tile ``cu_q[s] * ratio // BLOCK_M + s``,
which leaves room for its last, partial tile. With few tiles and many keys each tile's keys are split over several
programs, whose partial results a second kernel combines.

Compiling takes a second or two, so nothing that changes from step to step is a compile-time constant: the number of
splits is an argument, counts of segments come in a few classes, and ``compile_ahead`` makes all there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from vlcache_dist.kernels.gpu import device, packed, tuned

LOG2E = 1.4426950408889634
TUNED_DIM, TUNED_BLOCK = 128, 128  #: head_dim and pages for which launches are tuned (``benchmarks/tune.py``)
_FEW_ROWS = 32
_SEGMENTS = (64, 1024, 16384)  # classes of segment counts
_SPLITS = (4, 16, 64)  # classes of split counts; the last is the most there are
_NO_KEYS = tl.constexpr(-1.0e30)  # a finite "minus infinity" for running maxima: exp2(-inf - it) is 0, not NaN


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How the kernel is launched. ``splits`` None: chosen from the grid; ``tma``: keys by the bulk copy engine
    (needs pages that are a multiple of block_n, and a head_dim that is a power of two). ``pdl``: programmatic dependent
    launch, by which a program starts and looks up its pages while the previous kernel of the stream still runs.
    ``per_sm``: programs that a multiprocessor holds at once. ``early`` (needs tma): where keys are settled, a program
    asks for its first block of them before it waits for the previous kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool
    pdl: bool
    splits: int | None = None
    per_sm: int = 2
    early: bool = False


@triton.jit
def _tile(
    acc, m, l, page, q, k_src, v_src, table, base, kv_head, lo, hi, end, limit, keys, scale_log2, kv_row,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PAGED: tl.constexpr, TMA: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over key blocks [lo, hi) (in keys, lo a multiple of BLOCK_N). ``page`` is the page of ``lo``; the
    next one is loaded a block ahead, because keys that wait for it keep the pipeliner from having several in flight."""
    column = tl.arange(0, BLOCK_D)
    offset = tl.arange(0, BLOCK_N)
    ONE_PAGE: tl.constexpr = PAGED and BLOCK_SIZE % BLOCK_N == 0
    for start in tl.range(lo, hi, BLOCK_N):
        key = start + offset
        following = start + BLOCK_N
        slot = page * BLOCK_SIZE + start % BLOCK_SIZE
        if TMA:
            k = k_src.load([slot, kv_head * D])
        else:
            if ONE_PAGE:
                slots = page.to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE + offset
            elif PAGED:
                pages = tl.load(table + key // BLOCK_SIZE, mask=key < keys, other=0).to(tl.int64)
                slots = pages * BLOCK_SIZE + key % BLOCK_SIZE
            else:
                slots = base + key.to(tl.int64)
            places = slots[:, None] * kv_row + kv_head * D + column[None, :]
            if MASKED or BLOCK_D != D:
                inside = (key < keys)[:, None] & (column < D)[None, :]
                k = tl.load(k_src + places, mask=inside, other=0.0)
            else:
                k = tl.load(k_src + places)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = (key < keys)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= limit[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if ONE_PAGE:
            page = tl.load(table + following // BLOCK_SIZE, mask=following < end, other=0)
        if TMA:
            v = v_src.load([slot, kv_head * D])
            if MASKED:  # rows past the last key may hold anything, and 0 * NaN is NaN
                v = tl.where((key < keys)[:, None], v, 0.0)
        elif MASKED or BLOCK_D != D:
            v = tl.load(v_src + places, mask=inside, other=0.0)
        else:
            v = tl.load(v_src + places)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return acc, m, l, page


@triton.jit(
    do_not_specialize=["num_segments", "num_rows", "table_stride", "splits"],
    do_not_specialize_on_alignment=["cu_ptr", "kv_len_ptr", "table_ptr"],  # parts of longer arrays, single loads
)
def _segment_kernel(
    q_ptr, k_src, v_src, out_ptr, part_ptr, lse_ptr, cu_ptr, kv_len_ptr, table_ptr,
    num_segments, num_rows, splits, q_stride, table_stride, kv_row, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, ONE_TILE: tl.constexpr,
    SPLIT: tl.constexpr, MIN_BLOCKS: tl.constexpr, CAUSAL: tl.constexpr, PAGED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    RATIO: tl.constexpr = HEADS // KV_HEADS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles see the most keys: they start first
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    if ONE_TILE:  # no segment is longer than a tile
        segment = tile
        first = 0
    else:
        every = tl.arange(0, SEGMENTS)
        begin = tl.load(cu_ptr + every, mask=every < num_segments, other=2147483647).to(tl.int64)
        segment = tl.sum((begin * RATIO // BLOCK_M + every <= tile).to(tl.int32), 0) - 1
    row0 = tl.load(cu_ptr + segment)
    queries = tl.load(cu_ptr + segment + 1) - row0
    if not ONE_TILE:
        first = (tile - ((row0.to(tl.int64) * RATIO) // BLOCK_M + segment)).to(tl.int32) * BLOCK_M
    if first >= queries * RATIO:
        return
    if PAGED:
        keys = tl.load(kv_len_ptr + segment)
        base = segment.to(tl.int64) * 0
    else:
        keys = queries
        base = row0.to(tl.int64)
    table = table_ptr + segment.to(tl.int64) * table_stride

    if CAUSAL:
        tile_end = tl.minimum(keys, keys - queries + (first + BLOCK_M - 1) // RATIO + 1)
        clear_end = keys - queries + first // RATIO + 1  # every row sees the keys before this
    else:
        tile_end = keys
        clear_end = keys
    clear_end = clear_end // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(tile_end, BLOCK_N)
    if SPLIT:
        share = tl.maximum(tl.cdiv(blocks, splits), MIN_BLOCKS)
        lo = tl.minimum(split * share, blocks) * BLOCK_N
        hi = tl.minimum((split + 1) * share * BLOCK_N, tile_end)
    else:
        lo = 0
        hi = tile_end

    page = 0
    if PAGED and BLOCK_SIZE % BLOCK_N == 0:
        page = tl.load(table + lo // BLOCK_SIZE, mask=lo < hi, other=0)
    if EARLY:
        early_k = k_src.load([page * BLOCK_SIZE + lo % BLOCK_SIZE, kv_head * D])
        early_v = v_src.load([page * BLOCK_SIZE + lo % BLOCK_SIZE, kv_head * D])
        second_page = tl.load(table + (lo + BLOCK_N) // BLOCK_SIZE, mask=lo + BLOCK_N < hi, other=0)
    if PDL:  # lengths and block tables are older than the previous kernel; queries and keys are not
        gdc_wait()

    packed = first + tl.arange(0, BLOCK_M)
    query = packed // RATIO
    head = kv_head * RATIO + packed % RATIO
    column = tl.arange(0, BLOCK_D)
    live = query < queries
    row = row0 + query
    places = row.to(tl.int64)[:, None] * q_stride + (head * D)[:, None] + column[None, :]
    mask = live[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + places, mask=mask, other=0.0)
    limit = keys - queries + query  # the last key a row sees

    m = tl.full([BLOCK_M], _NO_KEYS, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if EARLY:
        if lo + BLOCK_N <= keys - queries:  # else it holds keys that the previous kernel may write
            s = tl.dot(q, tl.trans(early_k), input_precision=PRECISION)
            m = tl.max(s, 1) * scale_log2
            p = tl.exp2(s * scale_log2 - m[:, None])
            l = tl.sum(p, 1)
            acc = tl.dot(p.to(early_v.dtype), early_v, acc, input_precision=PRECISION)
            lo = lo + BLOCK_N
            page = second_page
    middle = tl.maximum(tl.minimum(clear_end, hi), lo)
    acc, m, l, page = _tile(
        acc, m, l, page, q, k_src, v_src, table, base, kv_head, lo, middle, hi, limit, keys, scale_log2, kv_row,
        False, CAUSAL, PAGED, TMA, BLOCK_SIZE, BLOCK_N, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    acc, m, l, page = _tile(
        acc, m, l, page, q, k_src, v_src, table, base, kv_head, middle, hi, hi, limit, keys, scale_log2, kv_row,
        True, CAUSAL, PAGED, TMA, BLOCK_SIZE, BLOCK_N, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(l > 0, l, 1.0)[:, None]
    if SPLIT:
        index = split.to(tl.int64) * num_rows * HEADS + row.to(tl.int64) * HEADS + head
        tl.store(lse_ptr + index, tl.where(l > 0, m + tl.log2(tl.where(l > 0, l, 1.0)), _NO_KEYS), mask=live)
        if hi > lo:  # the combining kernel gives an empty split weight 0 and does not read it
            tl.store(part_ptr + index[:, None] * D + column[None, :], acc, mask=mask)
    else:
        out = row.to(tl.int64)[:, None] * (HEADS * D) + (head * D)[:, None] + column[None, :]
        tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_segments", "num_rows", "splits"], do_not_specialize_on_alignment=["cu_ptr"])
def _combine_kernel(
    part_ptr, lse_ptr, out_ptr, cu_ptr, num_segments, num_rows, splits, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (row, head): out = sum of the splits' results weighted by their softmax mass. An empty split's
    part was never written. SKIP leaves it in memory (many rows, most of whose splits are empty); otherwise it is loaded
    and dropped, so that both loads are in flight (few rows, where latency is all)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    index = split.to(tl.int64) * num_rows * HEADS + pair
    live = pair < tl.load(cu_ptr + num_segments).to(tl.int64) * HEADS  # not a padding row
    lse = tl.load(lse_ptr + index, mask=split < splits, other=_NO_KEYS)
    lse = tl.where(live, lse, _NO_KEYS)
    inside = (split < splits)[:, None] & (column < D)[None, :]
    if SKIP:
        inside = inside & (lse > _NO_KEYS)[:, None]
    part = tl.load(part_ptr + index[:, None] * D + column[None, :], mask=inside, other=0.0)
    weight = tl.where(lse > _NO_KEYS, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    part = tl.where((weight > 0)[:, None], part, 0.0) * weight[:, None]
    mass = tl.sum(weight, 0)
    out = tl.sum(part, 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(out_ptr + pair * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)


def default_config(dtype: torch.dtype, head_dim: int, rows: int, block_size: int, hopper: bool) -> AttentionConfig:
    """The launch for the longest segment's ``rows`` (queries times heads per KV head)."""
    few = rows <= 16
    if dtype == torch.float32:
        return AttentionConfig(16 if few else 64, 32, 4, 2, False, False)
    if few and hopper and block_size % 128 == 0 and head_dim == 128:
        return AttentionConfig(16, 128, 4, 3, True, True, per_sm=1)
    tma = hopper and head_dim >= 16 and head_dim & (head_dim - 1) == 0 and block_size > 0 and block_size % 64 == 0
    return AttentionConfig(16 if few else 64, 64, 4, 3 if hopper else 2, tma, hopper)


def _config(tensor: torch.Tensor, rows: int, block_size: int) -> AttentionConfig:
    """What was fastest on this device if that was measured (``kernels.gpu.tuned``), ``default_config`` otherwise."""
    dim = tensor.shape[-1]
    default = default_config(tensor.dtype, dim, rows, block_size, device.is_hopper_or_later(tensor))
    if not (default.tma and default.block_m == 16 and dim == TUNED_DIM and block_size % TUNED_BLOCK == 0):
        return default
    found = tuned.choices(tensor).attention
    return default if found is None else AttentionConfig(**found)


def size_class(count: int, classes: Sequence[int]) -> int:
    """The least of ``classes`` that holds ``count``; beyond them, the next power of two."""
    return next((size for size in classes if size >= count), triton.next_power_of_2(count))


def choose_splits(tiles: int, blocks: int, processors: int, per_processor: int, min_blocks: int) -> int:
    """Splits that minimize waves x (key blocks per program + a fixed cost of about 2 blocks), at most 64; 1 where the
    tiles alone make several waves."""
    slots = processors * per_processor
    if tiles >= 4 * slots:
        return 1
    best, best_cost = 1, -(-tiles // slots) * (blocks + 2.0)
    for splits in range(2, min(_SPLITS[-1], max(1, blocks // min_blocks)) + 1):
        cost = -(-tiles * splits // slots) * (-(-blocks // splits) + 2.0) + 3.0 + 0.05 * splits
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, kv_len: torch.Tensor, table: torch.Tensor,
    max_q: int, max_kv: int, scale: float, causal: bool, block_size: int, kv_heads: int,
    config: AttentionConfig | None, out: torch.Tensor | None = None, settled: bool = False,
) -> torch.Tensor:  # fmt: skip
    num_rows, heads, dim = q.shape
    segments = len(cu) - 1
    if out is None:
        out = torch.empty((num_rows, heads, dim), dtype=q.dtype, device=q.device)
    if num_rows == 0 or segments == 0 or max_q == 0:
        return out
    if q.stride(2) != 1 or q.stride(1) != dim:
        q = q.contiguous()
    ratio = heads // kv_heads
    paged = block_size > 0
    c = config or _config(q, max_q * ratio, block_size)
    one_tile = max_q * ratio <= c.block_m
    longest = -(-max_q * ratio // c.block_m)
    tiles = segments * longest if min(segments, longest) == 1 else num_rows * ratio // c.block_m + segments
    blocks = -(-max_kv // c.block_n)
    min_blocks = max(1, 128 // c.block_n)
    splits = c.splits
    if splits is None:
        sms = device.processors(q.device.index or 0) if q.is_cuda else 4
        splits = choose_splits(min(tiles, segments * longest) * kv_heads, blocks, sms, c.per_sm, min_blocks)
    part = lse = out
    if splits > 1:
        part = torch.empty((splits, num_rows, heads, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((splits, num_rows, heads), dtype=torch.float32, device=q.device)
    k_src: Any = k
    v_src: Any = v
    if c.tma:
        flat = [k.shape[0] * block_size, kv_heads * dim]
        k_src = TensorDescriptor(k, flat, [kv_heads * dim, 1], [c.block_n, dim])
        v_src = TensorDescriptor(v, flat, [kv_heads * dim, 1], [c.block_n, dim])
    block_d = max(16, triton.next_power_of_2(dim))
    launch: dict[str, Any] = {"launch_pdl": True} if c.pdl else {}
    _segment_kernel[(tiles, kv_heads, splits)](
        q, k_src, v_src, out, part, lse, cu, kv_len, table,
        segments, num_rows, splits, q.stride(0), table.stride(0), k.stride(1) if paged else k.stride(0), scale * LOG2E,
        HEADS=heads, KV_HEADS=kv_heads, D=dim, BLOCK_D=block_d, BLOCK_SIZE=max(1, block_size),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, SEGMENTS=1 if one_tile else size_class(segments, _SEGMENTS),
        ONE_TILE=one_tile, SPLIT=splits > 1, MIN_BLOCKS=min_blocks, CAUSAL=causal, PAGED=paged, TMA=c.tma,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", PDL=c.pdl, EARLY=c.early and c.tma and settled,
        num_warps=c.warps, num_stages=c.stages, **launch,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_rows * heads,)](
            part, lse, out, cu, segments, num_rows, splits, HEADS=heads, D=dim, BLOCK_D=block_d,
            BLOCK_S=size_class(splits, _SPLITS), SKIP=num_rows > _FEW_ROWS, PDL=c.pdl,
            num_warps=2 if splits <= 16 else 4, **launch,
        )  # fmt: skip
    return out


def segment_attention(
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
    *,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """See ``kernels.attention.segment_attention_reference``. ``max_q`` and ``max_kv`` must not be too small; larger
    values cost empty programs. Rows past cu_q[S] are left unwritten."""
    _, block_size, kv_heads, _ = k_pages.shape
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous")
    return _launch(
        q,
        k_pages,
        v_pages,
        cu_q,
        kv_len,
        block_table,
        max_q,
        max_kv,
        scale,
        True,
        block_size,
        kv_heads,
        config,
        out,
        settled,
    )


def compile_ahead(heads: int, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Compile, for ``heads`` query heads over pages of this kind, every form of ``segment_attention`` with its default
    launches; what is launched for it finds empty segments."""
    block_size, kv_heads, dim = k_pages.shape[1:]
    ratio = heads // kv_heads
    q = torch.zeros((_FEW_ROWS + 1, heads, dim), dtype=k_pages.dtype, device=k_pages.device)
    cu = torch.zeros(_SEGMENTS[-1] + 1, dtype=torch.int32, device=k_pages.device)

    def launch(rows: int, segments: int, max_q: int, splits: int) -> None:
        config = replace(_config(q, max_q * ratio, block_size), splits=splits)
        table = cu[:segments, None]
        for settled in (False, True)[: 1 + config.early]:
            _launch(
                q[:rows], k_pages, v_pages, cu[: segments + 1], cu[:segments], table, max_q, block_size, 1.0, True,
                block_size, kv_heads, config, None, settled,
            )  # fmt: skip

    tile = _config(q, 1 << 20, block_size).block_m
    forms = [(1, 1), (max(1, tile // ratio), 1), *((tile + 1, segments) for segments in _SEGMENTS)]
    for max_q, segments in forms:
        for splits in (1, 2):
            launch(1, segments, max_q, splits)
    for splits in _SPLITS:
        for rows in (1, _FEW_ROWS + 1):
            launch(rows, 1, 1, splits)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu: torch.Tensor,
    max_len: int,
    scale: float | None = None,
    causal: bool = False,
    *,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """See ``kernels.attention.varlen_attention_reference``. k and v of different row strides are copied."""
    dim = q.shape[2]
    scale = dim**-0.5 if scale is None else scale
    plain = not causal and config is None and k.shape == q.shape and q.dtype != torch.float32
    if plain and device.is_hopper_or_later(q) and packed.halves(dim) is not None:
        tile = (64, 64, 4, 2) if max_len <= 64 else (128, 64, 8, 3)
        return packed.packed_attention(q, k, v, cu, max_len, scale, *tile)
    if k.stride() != v.stride() or k.stride(2) != 1 or k.stride(1) != dim:
        k, v = k.contiguous(), v.contiguous()
    table = cu[None]  # not read: keys are packed, not paged
    return _launch(q, k, v, cu, cu, table, max_len, max_len, scale, causal, 0, k.shape[1], config)
