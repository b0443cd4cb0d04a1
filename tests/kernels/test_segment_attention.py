"""Paged and packed attention: the torch definition and the Triton kernel against fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import error, normal, paged

from vlcache_dist.kernels.attention import segment_attention_reference, varlen_attention_reference
from vlcache_dist.kernels.gpu import attention as gpu
from vlcache_dist.kernels.gpu import packed
from vlcache_dist.kernels.gpu.attention import AttentionConfig

MIXED = [(5, 50), (1, 33), (1, 100), (17, 17), (20, 21), (3, 64)]
DECODE = [(1, 50), (1, 33), (1, 100), (1, 1), (1, 65)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("segments", [MIXED, DECODE, [(40, 40)], [(7, 300)], [(1, 1)]])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 16), (4, 4, 24), (7, 1, 32)])
def test_reference(segments, heads, kv_heads, dim, generator):
    case = paged(segments, heads, kv_heads, dim, 16, torch.float64, "cpu", generator, extra_rows=2)
    got = segment_attention_reference(*case.args())
    want = case.want()
    assert error(got[: len(want)], want) < 1e-12
    assert (got[len(want) :] == 0).all()


def _dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])


@pytest.mark.parametrize("segments", [MIXED, DECODE, [(40, 40)], [(3, 300)]])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("block_m", "block_n", "block_size", "tma"), [(16, 16, 16, False), (16, 32, 16, False), (32, 16, 64, True)]
)
def test_triton(device, segments, splits, block_m, block_n, block_size, tma, generator):
    for dtype in _dtypes(device):
        if dtype == torch.float32 and tma:
            continue
        dim = 64 if device == "cuda" else 16
        case = paged(segments, 6, 2, dim, block_size, dtype, device, generator, extra_rows=3)
        config = AttentionConfig(block_m, block_n, 4, 2, tma, False, splits)
        got = gpu.segment_attention(*case.args(), config=config)
        want = case.want()
        assert error(got[: len(want)], want) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("block_n", "block_size"), [(16, 16), (16, 32)])
def test_triton_settled_keys(device, splits, block_n, block_size, generator):
    """A first block of keys that is read early counts once, whichever blocks a split has; unused slots are poison."""
    for dtype in _dtypes(device)[1:]:
        dim = 64 if device == "cuda" else 16
        segments = [(1, 100), (2, 49), (1, 16), (1, 17), (1, 1)]
        case = paged(segments, 6, 2, dim, block_size, dtype, device, generator, extra_rows=1)
        for pages in (case.k_pages, case.v_pages):
            pages[0].nan_to_num_(0.0)  # where a program without keys looks
        config = AttentionConfig(16, block_n, 4, 2, True, False, splits, early=True)
        want = case.want()
        for settled in (True, False):
            got = gpu.segment_attention(*case.args(), settled=settled, config=config)
            assert error(got[: len(want)], want) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [20, 64])
@pytest.mark.parametrize("block_size", [8, 32])
def test_triton_default_config_and_odd_sizes(device, head_dim, block_size, generator):
    for dtype in _dtypes(device)[:2]:
        case = paged([(9, 30), (1, 77)], 7, 1, head_dim, block_size, dtype, device, generator)
        assert error(gpu.segment_attention(*case.args()), case.want()) < TOLERANCE[dtype]


def test_triton_loose_bounds_and_empty_segments(device, generator):
    """A captured graph calls with the largest max_q and max_kv of its bucket, and pads with empty segments."""
    case = paged([(4, 20), (1, 40)], 4, 2, 16, 16, torch.float32, device, generator)
    cu_q = torch.cat((case.cu_q, case.cu_q[-1:], case.cu_q[-1:]))
    kv_len = torch.nn.functional.pad(case.kv_len, (0, 2))
    table = torch.nn.functional.pad(case.block_table, (0, 0, 0, 2))
    got = gpu.segment_attention(
        case.q, case.k_pages, case.v_pages, cu_q, kv_len, table, 16, 512, case.scale,
        config=AttentionConfig(16, 16, 4, 2, False, False, None),
    )  # fmt: skip
    assert error(got, case.want()) < TOLERANCE[torch.float32]


def test_triton_reads_strided_queries(device, generator):
    case = paged([(6, 20)], 4, 2, 16, 16, torch.float32, device, generator)
    fused = torch.full((6, 10, 16), float("nan"), device=device)
    fused[:, :4] = case.q
    want = case.want()
    case.q = fused[:, :4]
    assert error(gpu.segment_attention(*case.args()), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 20), (6, 2, 16)])
def test_varlen(device, causal, heads, kv_heads, dim, generator):
    lengths = [5, 33, 0, 16, 40]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    fused = normal((int(cu[-1]), heads + 2 * kv_heads, dim), torch.float32, "cpu", generator)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    want = []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        ks = k[a:b].double().repeat_interleave(heads // kv_heads, 1)
        vs = v[a:b].double().repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), ks) * dim**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
        want.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs))
    expected = torch.cat(want)
    assert error(varlen_attention_reference(q, k, v, cu, 40, causal=causal), expected) < 1e-6
    fused, cu = fused.to(device), cu.to(device)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    assert error(gpu.varlen_attention(q, k, v, cu, 40, causal=causal), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dim", [16, 48, 80])
@pytest.mark.parametrize("lengths", [[5, 33, 0, 16, 40], [64, 16, 3], [1]])
def test_packed(device, dim, lengths, generator):
    """The vision tower's kernel, on parts of a fused projection."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    for dtype in _dtypes(device)[1:]:
        fused = normal((int(cu[-1]), 3, 2, dim), dtype, "cpu", generator)
        q, k, v = fused.unbind(1)
        want = varlen_attention_reference(q.double(), k.double(), v.double(), cu, max(lengths))
        q, k, v = fused.to(device).unbind(1)
        for block_m in (16, 64):
            got = packed.packed_attention(q, k, v, cu.to(device), max(lengths), dim**-0.5, block_m, 16, 4, 2)
            assert error(got, want) < TOLERANCE[dtype]


def test_halves():
    got = {dim: packed.halves(dim) for dim in (16, 24, 64, 80, 96, 100, 128)}
    want = {16: (16, 0), 24: None, 64: (64, 0), 80: (64, 16), 96: (64, 32), 100: None, 128: (128, 0)}
    assert got == want


def test_choose_splits_fills_the_processors_only_when_it_pays():
    assert gpu.choose_splits(tiles=3584, blocks=128, processors=132, per_processor=1, min_blocks=1) == 1
    assert gpu.choose_splits(tiles=4, blocks=4, processors=132, per_processor=1, min_blocks=4) == 1
    few = gpu.choose_splits(tiles=4, blocks=256, processors=132, per_processor=2, min_blocks=2)
    assert 4 * few > 100
    long = gpu.choose_splits(tiles=1, blocks=8192, processors=132, per_processor=1, min_blocks=1)
    assert 32 < long <= 64, "the combining kernel is compiled for 64 parts at most"
