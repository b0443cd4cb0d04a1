"""Checks and times every kernel on a CUDA device at Qwen2.5-VL-7B shapes, and prints one JSON object.

    python benchmarks/kernels.py --json benchmarks/results/kernels-h200.json

Times are medians of device-event timings of CUDA graph replays after a warm-up. A graph holds one call per layer, over
28 layers of pages (about 1 GB), so that no call finds its keys in L2. Bandwidths are bytes read plus bytes written,
beside what a plain device copy reaches in the same run. Errors are relative 2-norms against fp32 torch on the device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlcache_dist import kernels
from vlcache_dist.bench.device_time import Call, graph_us, median_us
from vlcache_dist.kernels import backends
from vlcache_dist.kernels.attention import segment_attention_reference
from vlcache_dist.kernels.rotate_scatter import rotate_scatter_reference

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 28, 28, 4, 128, 128
HIDDEN, INNER = 3_584, 18_944
VISION_HEADS, VISION_DIM = 16, 80
KEYS = 16_384
WIDTH = KV_HEADS * DIM
DTYPE = torch.bfloat16
SCALE = DIM**-0.5


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


@dataclass
class Bench:
    """Pages of all layers with one sequence of KEYS tokens in shuffled blocks, and the rows found so far."""

    pages: torch.Tensor
    table: torch.Tensor
    copy_gbs: float
    rows: list[dict[str, Any]]

    def add(
        self, kernel: str, shape: str, us: float, *, gigabytes: float = 0.0, tera: float = 0.0, **more: Any
    ) -> None:
        row: dict[str, Any] = {"kernel": kernel, "shape": shape, "us": round(us, 2)}
        if gigabytes:
            row |= {"gb_s": round(gigabytes / us * 1e6, 1), "of_copy": round(gigabytes / us * 1e6 / self.copy_gbs, 3)}
        if tera:
            row["tflop_s"] = round(tera / us * 1e6, 1)
        self.rows.append(row | more)
        print(row | more, flush=True)


def copy_bandwidth() -> float:
    """GB/s, read plus written, of a device copy of 2 GB."""
    source = _normal(1 << 30)
    target = torch.empty_like(source)
    us = median_us(lambda: target.copy_(source), 20)
    return 2 * source.numel() * source.element_size() / us / 1e3


def prepare() -> Bench:
    blocks = KEYS // BLOCK + 8
    pages = _normal(LAYERS * 2 * blocks * BLOCK * WIDTH).view(LAYERS, 2, blocks, BLOCK, KV_HEADS, DIM)
    table = (torch.randperm(blocks - 1, device="cuda")[: KEYS // BLOCK] + 1).int()[None].contiguous()
    return Bench(pages, table, copy_bandwidth(), [])


def extents(bench: Bench, tokens: int) -> None:
    """Rotate and scatter, pack, unpack, gather of ``tokens`` tokens in all layers."""
    slots = (bench.table[0, :, None].long() * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()[:tokens]
    arena = _normal(LAYERS * 2 * tokens * WIDTH)
    base = torch.arange(tokens, device="cuda") * WIDTH
    span = torch.full((tokens,), tokens, device="cuda")
    angle = torch.rand(tokens, DIM // 2, device="cuda") * 100
    cos, sin = angle.cos(), angle.sin()
    moved = 2 * arena.numel() * arena.element_size() / 1e9
    pages = bench.pages
    want = torch.zeros_like(pages[:1])
    rotate_scatter_reference(arena, want, base, span, slots, cos, sin, 0, 1)
    kernels.rotate_scatter(arena, pages, base, span, slots, cos, sin, 0, LAYERS)
    flat = (pages[0].view(2, -1, WIDTH)[:, slots], want[0].view(2, -1, WIDTH)[:, slots])
    errors = {"error": _error(*flat), "v_equal": torch.equal(flat[0][1], flat[1][1])}
    us = graph_us([lambda: kernels.rotate_scatter(arena, pages, base, span, slots, cos, sin, 0, LAYERS)])
    bench.add("rotate_scatter", f"{tokens} tokens", us, gigabytes=moved, **errors)
    kernels.pack_rows(pages, slots, arena, 0)
    same = torch.equal(arena.view(LAYERS, 2, tokens, WIDTH), pages.view(LAYERS, 2, -1, WIDTH)[:, :, slots])
    us = graph_us([lambda: kernels.pack_rows(pages, slots, arena, 0)])
    bench.add("pack_rows", f"{tokens} tokens", us, gigabytes=moved, equal=same)
    fresh = torch.zeros_like(pages)
    kernels.unpack_rows(arena, 0, fresh, slots)
    same = torch.equal(arena.view(LAYERS, 2, tokens, WIDTH), fresh.view(LAYERS, 2, -1, WIDTH)[:, :, slots])
    del fresh
    us = graph_us([lambda: kernels.unpack_rows(arena, 0, pages, slots)])
    bench.add("unpack_rows", f"{tokens} tokens", us, gigabytes=moved, equal=same)
    us = graph_us([lambda: kernels.gather_extent(pages, arena, slots, base, span, 0, LAYERS)])
    bench.add("gather_extent", f"{tokens} tokens", us, gigabytes=moved)
    pages.normal_()


def _backends(dim: int) -> list[backends.AttentionBackend]:
    device = torch.device("cuda")
    names = [name for name in backends.NAMES if name != "torch" and not backends.unavailable(name, device, DTYPE, dim)]
    return [backends.select(device, DTYPE, dim, name) for name in names]


def segments(bench: Bench, queries: int) -> None:
    """One segment of ``queries`` rows over KEYS keys, on every backend present that can read the pages."""
    q, cu, kv_len = _normal(queries, HEADS, DIM), _int32([0, queries]), _int32([KEYS])
    pairs = queries * (KEYS - (queries - 1) / 2)
    moved = 2 * (KEYS * WIDTH * 2 + 2 * q.numel()) / 1e9
    pages, table = bench.pages, bench.table
    rows = slice(max(0, queries - 256), queries)  # the reference of more rows would need too much memory
    args = (_int32([0, rows.stop - rows.start]), kv_len, table, 256, KEYS, SCALE)
    want = segment_attention_reference(q[rows].float(), pages[0, 0].float(), pages[0, 1].float(), *args)

    def call(backend: backends.AttentionBackend, layer: int) -> torch.Tensor:
        return backend.segment_attention(q, pages[layer, 0], pages[layer, 1], cu, kv_len, table, queries, KEYS, SCALE)

    for backend in _backends(DIM):
        if BLOCK % backend.page_multiple:
            continue
        error = _error(call(backend, 0)[rows], want)
        layers = range(LAYERS if queries <= 2_048 else 2)
        us = graph_us([lambda layer=layer, backend=backend: call(backend, layer) for layer in layers])  # type: ignore[misc]
        tera = 4 * pairs * HEADS * DIM / 1e12
        bench.add(
            "segment_attention", f"{queries} queries over {KEYS} keys", us, gigabytes=moved if queries == 1 else 0.0,
            tera=tera, backend=backend.name, error=error,
        )  # fmt: skip


def decode(bench: Bench, batch: int, context: int) -> None:
    """One query for each of ``batch`` sequences of ``context`` tokens; two layers of pages in turn."""
    blocks = context // BLOCK
    pages = _normal(4 * (batch * blocks + 1) * BLOCK * WIDTH).view(2, 2, -1, BLOCK, KV_HEADS, DIM)
    table = (torch.randperm(batch * blocks, device="cuda") + 1).view(batch, blocks).int()
    q, cu = _normal(batch, HEADS, DIM), _int32(list(range(batch + 1)))
    kv_len = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    moved = 2 * (2 * batch * context * WIDTH + 2 * q.numel()) / 1e9

    def call(layer: int) -> torch.Tensor:
        k, v = pages[layer % 2]
        return kernels.segment_attention(q, k, v, cu, kv_len, table, 1, context, SCALE)

    us = graph_us([lambda layer=layer: call(layer) for layer in range(8)])  # type: ignore[misc]
    bench.add("segment_attention", f"decode, batch {batch}, context {context}", us, gigabytes=moved, backend="auto")


def vision(bench: Bench, patches: int) -> None:
    """Whole-image attention and 64-patch windows of the vision tower."""
    qkv = _normal(patches, 3, VISION_HEADS, VISION_DIM)
    q, k, v = qkv.unbind(1)
    whole, windows = _int32([0, patches]), _int32(list(range(0, patches + 1, 64)))
    scale = VISION_DIM**-0.5
    heads = [x[:, 0].float() for x in (q, k, v)]
    want = torch.softmax(heads[0][:64] @ heads[1].T * scale, -1) @ heads[2]
    qw, kw, vw = (x.float().view(-1, 64, VISION_HEADS, VISION_DIM).transpose(1, 2) for x in (q, k, v))
    small = F.scaled_dot_product_attention(qw, kw, vw).transpose(1, 2).reshape(patches, VISION_HEADS, VISION_DIM)
    tera = 4 * patches**2 * VISION_HEADS * VISION_DIM / 1e12
    moved = 4 * patches * VISION_HEADS * VISION_DIM * 2 / 1e9
    for backend in _backends(VISION_DIM):
        shown: dict[str, Any] = {"backend": backend.name}
        error = _error(backend.varlen_attention(q, k, v, whole, patches, scale, False)[:64, 0], want)
        us = graph_us([lambda b=backend: b.varlen_attention(q, k, v, whole, patches, scale, False)], 10)  # type: ignore[misc]
        bench.add("varlen_attention", f"whole image, {patches} patches", us, tera=tera, error=error, **shown)
        error = _error(backend.varlen_attention(q, k, v, windows, 64, scale, False), small)
        us = graph_us([lambda b=backend: b.varlen_attention(q, k, v, windows, 64, scale, False)] * 4)  # type: ignore[misc]
        bench.add("varlen_attention", f"windows, {patches} patches", us, gigabytes=moved, error=error, **shown)
    angle = torch.rand(patches, VISION_DIM // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    both = qkv.view(patches, 3 * VISION_HEADS, VISION_DIM)[:, : 2 * VISION_HEADS]
    us = graph_us([lambda: kernels.rotate(both, cos, sin)] * 4)
    bench.add("rotate", f"vision q and k, {patches} patches", us, gigabytes=moved)


def pointwise(bench: Bench, rows: int) -> None:
    """Norms, SwiGLU and the fused rotation and KV write of ``rows`` rows, beside torch where torch has one."""
    x, residual, gate_up = _normal(rows, HIDDEN), _normal(rows, HIDDEN), _normal(rows, 2 * INNER)
    weight = _normal(HIDDEN)
    shape, norm = f"{rows} rows", 2 * rows * HIDDEN * 2 / 1e9
    us = graph_us([lambda: kernels.rms_norm(x, weight, 1e-6)] * 8)
    bench.add("rms_norm", shape, us, gigabytes=norm, error=_error(kernels.rms_norm(x, weight, 1e-6),
              F.rms_norm(x.float(), (HIDDEN,), weight.float(), 1e-6)))  # fmt: skip
    bench.add("torch F.rms_norm", shape, graph_us([lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-6)] * 8), gigabytes=norm)
    us = graph_us([lambda: kernels.add_rms_norm(x, residual, weight, 1e-6)] * 8)
    bench.add("add_rms_norm", shape, us, gigabytes=2 * norm)
    us = graph_us([lambda: kernels.silu_mul(gate_up)] * 8)
    gate, up = gate_up.chunk(2, -1)
    bench.add("silu_mul", shape, us, gigabytes=3 * rows * INNER * 2 / 1e9,
              error=_error(kernels.silu_mul(gate_up), F.silu(gate.float()) * up.float()))  # fmt: skip
    us = graph_us([lambda: F.silu(gate) * up] * 8)
    bench.add("torch silu * up", shape, us, gigabytes=3 * rows * INNER * 2 / 1e9)
    q, k, v = _normal(rows, HEADS + 2 * KV_HEADS, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    angle = torch.rand(rows, DIM // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(KEYS, device="cuda")[:rows]
    base = torch.arange(rows, device="cuda") * WIDTH
    tokens = torch.full((rows,), rows, device="cuda")
    arena = torch.empty(4 * rows * WIDTH, device="cuda", dtype=DTYPE)
    k_pages, v_pages = bench.pages[0]
    tail = (cos, sin, k_pages, v_pages, slots)
    us = graph_us([lambda: kernels.rotate_and_write(q, k, v, *tail, None, base, tokens, 1)] * 8)
    moved = 2 * rows * (HEADS + 2 * KV_HEADS) * DIM * 2 / 1e9
    bench.add("rotate_and_write", shape, us, gigabytes=moved)
    us = graph_us([lambda: kernels.rotate_and_write(q, k, v, *tail, arena, base, tokens, 1)] * 8)
    bench.add("rotate_and_write, recording", shape, us, gigabytes=moved + 2 * rows * WIDTH * 2 / 1e9)
    apart: list[Call] = [
        lambda: kernels.rotate(q, cos, sin),
        lambda: kernels.write_kv(k, v, *tail, None, base, tokens, 1),
    ]
    us = 2 * graph_us(apart * 8)
    bench.add("rotate, then write_kv", shape, us, gigabytes=moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = prepare()
    a = _normal(8_192, 8_192)
    gemm = 2 * 8_192**3 / graph_us([lambda: a @ a]) / 1e6
    for tokens in (1_024, KEYS):
        extents(bench, tokens)
    for queries in (1, 4, 16, 64, 256, 512, 2_048, KEYS):
        segments(bench, queries)
    for batch, context in ((1, 2_048), (8, 2_048), (64, 2_048), (1, 32_768)):
        decode(bench, batch, context)
    for patches in (4_096, 16_384, 65_536):
        vision(bench, patches)
    for rows in (1, 256, KEYS):
        pointwise(bench, rows)
    result = {
        "machine": {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": round(bench.copy_gbs, 1),
            "gemm_tflop_s": round(gemm, 1),
        },
        "rows": bench.rows,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
