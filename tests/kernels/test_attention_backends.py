"""One contract suite for every attention backend that can run here, and how a backend is chosen."""

from __future__ import annotations

import logging

import pytest
import torch
from kernel_cases import error, normal, paged

from vlcache_dist import kernels
from vlcache_dist.errors import ConfigError
from vlcache_dist.kernels import backends
from vlcache_dist.kernels.attention import varlen_attention_reference

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def _params() -> list[object]:
    on_gpu = [pytest.param(name, "cuda", marks=[pytest.mark.gpu, needs_cuda]) for name in backends.NAMES]
    return [pytest.param("torch", "cpu"), pytest.param("auto", "cpu"), *on_gpu]


@pytest.fixture
def make(name, where):
    device = torch.device(where)

    def build(head_dim: int, dtype: torch.dtype) -> backends.AttentionBackend:
        reason = backends.unavailable(name, device, dtype, head_dim)
        if reason:
            pytest.skip(reason)
        return backends.select(device, dtype, head_dim, name)

    return build


every_backend = pytest.mark.parametrize(("name", "where"), _params())
cutlass_noise = pytest.mark.filterwarnings(
    "ignore:Argument .* cannot be converted:UserWarning", "ignore::DeprecationWarning"
)
CASES = {
    "one query": [(1, 300)],
    "decode": [(1, 50), (1, 257), (1, 1), (1, 700)],
    "from the start": [(300, 300)],
    "segments": [(5, 50), (130, 400), (1, 33), (17, 17)],
    "many": [(600, 1000), (1, 999)],
    "padding": [(130, 400), (1, 20), (0, 0), (0, 5)],
}


@cutlass_noise
@every_backend
@pytest.mark.parametrize("segments", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(14, 2), (4, 4)])
def test_segments(make, where, segments, heads, kv_heads, generator):
    """Poison in unused slots is finite: that is all a backend may count on."""
    head_dim, dtype = (128, torch.bfloat16) if where == "cuda" else (16, torch.float32)
    built = make(head_dim, dtype)
    for block_size in {max(16, built.page_multiple), backends.page_size(built, 16)}:
        case = paged(segments, heads, kv_heads, head_dim, block_size, dtype, where, generator, poison=1e4, extra_rows=2)
        got = built.segment_attention(*case.args())
        want = case.want()
        assert got.shape == case.q.shape and got.dtype == dtype
        assert error(got[: len(want)], want) < TOLERANCE[dtype]


@cutlass_noise
@every_backend
@pytest.mark.parametrize("lengths", [[64, 64, 64], [5, 64, 17, 1], [700, 90]])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(make, where, lengths, causal, generator):
    head_dim, dtype = (80, torch.bfloat16) if where == "cuda" else (20, torch.float32)
    built = make(head_dim, dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    fused = normal((int(cu[-1]), 3, 4, head_dim), dtype, "cpu", generator)
    q, k, v = fused.double().unbind(1)
    want = varlen_attention_reference(q, k, v, cu, max(lengths), causal=causal)
    q, k, v = fused.to(where).unbind(1)
    got = built.varlen_attention(q, k, v, cu.to(where), max(lengths), head_dim**-0.5, causal)
    assert got.shape == q.shape and error(got, want) < TOLERANCE[dtype]


@cutlass_noise
@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", backends.NAMES[1:])
@pytest.mark.parametrize("queries", [1, 300])
def test_capture_in_a_graph(name, queries, generator):
    """A captured call follows its inputs: lengths, tables and queries change between replays."""
    device = torch.device("cuda")
    reason = backends.unavailable(name, device, torch.bfloat16, 128)
    if reason or name == "torch":
        pytest.skip(reason or "reads lengths on the host")
    built = backends.select(device, torch.bfloat16, 128, name)
    block_size = backends.page_size(built, 128)
    first = paged([(queries, 900)], 14, 2, 128, block_size, torch.bfloat16, "cuda", generator, poison=1.0)
    second = paged([(queries, 901 - queries)], 14, 2, 128, block_size, torch.bfloat16, "cuda", generator, poison=1.0)
    args = (first.q, first.k_pages, first.v_pages, first.cu_q, first.kv_len, first.block_table, queries, 1024)
    built.segment_attention(*args, first.scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = built.segment_attention(*args, first.scale)
    want = second.want()
    for name_, blocks in (("k_pages", second.k_pages), ("v_pages", second.v_pages)):
        getattr(first, name_)[: len(blocks)].copy_(blocks)
    first.q.copy_(second.q)
    first.kv_len.copy_(second.kv_len)
    first.block_table[:, : second.block_table.shape[1]].copy_(second.block_table)
    graph.replay()
    assert error(out, want) < TOLERANCE[torch.bfloat16]


def test_auto_is_torch_on_cpu_and_says_so(caplog):
    backends.select.cache_clear()
    with caplog.at_level(logging.INFO, "vlcache_dist.kernels.backends"):
        assert backends.select(CPU, torch.float32, 16).name == "torch"
        backends.select(CPU, torch.float32, 16)
    assert len(caplog.records) == 1 and "torch.float32, head_dim 16: torch" in caplog.text


@pytest.mark.parametrize(("name", "reason"), [("triton", "CUDA device"), ("flash-attn-2", "CUDA device")])
def test_a_backend_that_cannot_run_here_is_refused_with_the_reason(name, reason):
    with pytest.raises(ConfigError, match=reason):
        backends.select(CPU, torch.float32, 16, name)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="unknown"):
        backends.select(CPU, torch.float32, 16, "xformers")
    with pytest.raises(ConfigError, match="unknown"):
        backends.prefer("xformers")


class Recorder:
    def __init__(self, name: str, page_multiple: int, page_best: int = 1) -> None:
        self.name, self.page_multiple, self.page_best = name, page_multiple, page_best
        self.calls = 0
        self.settled = None

    def segment_attention(self, q, *rest):
        self.calls += 1
        self.settled = rest[-1]
        return q

    def varlen_attention(self, q, *_):
        self.calls += 1
        return q


@pytest.mark.parametrize(
    ("rows", "max_q", "block_size", "chosen"),
    [
        (16_384, 16_384, 128, "many"),
        (512, 512, 256, "many"),
        (256, 256, 128, "few"),  # too few tiles
        (4_096, 1, 128, "few"),  # decode
        (512, 512, 64, "few"),  # pages that the other cannot read
    ],
)
def test_auto_goes_by_shape(rows, max_q, block_size, chosen):
    few, many = Recorder("few", 1), Recorder("many", 128)
    auto = backends.Auto(few, many, processors=132)
    pages = torch.empty((1, block_size, 4, 8))
    none = torch.empty(0)
    args = (torch.empty((rows, 28, 8)), pages, pages, none, none, none, max_q, 16_384, 1.0)
    auto.segment_attention(*args)
    called = {"few": few, "many": many}[chosen]
    assert called.calls == 1 and few.calls + many.calls == 1 and called.settled is False
    auto.segment_attention(*args, None, True)
    assert called.calls == 2 and called.settled is True


@pytest.mark.parametrize(("max_len", "chosen"), [(64, "few"), (4_096, "many")])
def test_auto_takes_windows_and_whole_images_apart(max_len, chosen):
    few, many = Recorder("few", 1), Recorder("many", 128)
    empty = torch.empty((1, 4, 8))
    backends.Auto(few, many, processors=132).varlen_attention(empty, empty, empty, empty, max_len, 1.0, False)
    assert {"few": few.calls, "many": many.calls}[chosen] == 1 and few.calls + many.calls == 1


@pytest.mark.parametrize(
    ("multiple", "best", "wanted", "size"),
    [(1, 1, 16, 16), (1, 128, 16, 128), (128, 128, 200, 256), (256, 256, 300, 512), (256, 1, 256, 256)],
)
def test_page_size(multiple, best, wanted, size):
    assert backends.page_size(Recorder("x", multiple, best), wanted) == size


def test_public_functions_run_on_cpu(generator):
    case = paged([(3, 9), (1, 20)], 4, 2, 16, 8, torch.float64, "cpu", generator)
    assert error(kernels.segment_attention(*case.args()), case.want()) < 1e-12
    q = normal((6, 2, 8), torch.float64, "cpu", generator)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    assert error(kernels.varlen_attention(q, q, q, cu, 6), varlen_attention_reference(q, q, q, cu, 6)) < 1e-12
