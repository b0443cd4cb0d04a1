"""Rotation, KV writes, scatter, gather, pack, unpack: copies are bit-equal, rotations one rounding from fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import angles, error, normal, rounding

from vlcache_dist.kernels.gpu import extents as gpu_extents
from vlcache_dist.kernels.gpu import rope as gpu_rope
from vlcache_dist.kernels.kv_write import rotate_and_write_reference, write_kv_reference
from vlcache_dist.kernels.pack import pack_rows_reference, unpack_rows_reference
from vlcache_dist.kernels.rope import rotate_reference
from vlcache_dist.kernels.rotate_scatter import gather_extent_reference, rotate_scatter_reference

SHAPES = [(1, 16), (2, 24), (5, 32)]  # kv heads, head_dim


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """fp64, element by element as the rotation matrix says."""
    x, cos, sin = x.double().cpu(), cos.double().cpu(), sin.double().cpu()
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for d in range(half):
        a, b = x[..., d], x[..., d + half]
        c, s = cos[:, d, None], sin[:, d, None]
        out[..., d], out[..., d + half] = a * c - b * s, b * c + a * s
    return out


@pytest.fixture(params=["torch", "triton"])
def triton(request):
    return request.param == "triton"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_rotate(device, triton, dtype, heads, dim, generator):
    fused = normal((37, heads + 3, dim), dtype, device, generator)
    x = fused[:, :heads]
    cos, sin = angles(37, dim, device, generator)
    got = (gpu_rope.rotate if triton else rotate_reference)(x, cos, sin)
    assert got.shape == x.shape and got.dtype == dtype
    assert error(got, _rotated(x, cos, sin)) < rounding(dtype, device)


def _pages(layers, blocks, block_size, kv_heads, dim, dtype, device):
    return torch.full((layers, 2, blocks, block_size, kv_heads, dim), float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize(("kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("fused", [False, True])
def test_write_kv(device, triton, dtype, kv_heads, dim, fused, generator):
    rows, queries, span, layer, layers = 19, 13, 11, 2, 3
    width = kv_heads * dim
    pages = _pages(layers, 6, 8, kv_heads, dim, dtype, device)
    arena = torch.full((7 + layers * 2 * span * width + 5,), float("nan"), dtype=dtype, device=device)
    k, v = (normal((rows, kv_heads, dim), dtype, device, generator).float() for _ in range(2))
    q = normal((queries, 9, dim), dtype, device, generator)
    cos, sin = angles(rows, dim, device, generator)
    slots = torch.randperm(48, generator=generator)[:rows]
    slots[4] = -1
    base = torch.full((rows,), -1)
    tokens = torch.zeros(rows, dtype=torch.int64)
    base[3:8], tokens[3:8] = 7 + torch.tensor([0, 1, 10, 4, 5]) * width, span
    slots, base, tokens = slots.to(device), base.to(device), tokens.to(device)
    args = (k, v, cos, sin, pages[layer, 0], pages[layer, 1], slots, arena, base, tokens, layer)
    if fused:
        out = (gpu_rope.rotate_and_write if triton else rotate_and_write_reference)(q, *args)
        assert error(out, _rotated(q, cos[:queries], sin[:queries])) < rounding(dtype, device)
    else:
        (gpu_rope.write_kv if triton else write_kv_reference)(*args)
    stored_k, stored_v = k.to(dtype), v.to(dtype)
    live = slots.cpu() >= 0
    flat = pages.view(layers, 2, 48, kv_heads, dim)
    wrote = flat[layer, 0].cpu()[slots.cpu()[live]]
    assert error(wrote, _rotated(stored_k, cos, sin)[live]) < rounding(dtype, device)
    assert torch.equal(flat[layer, 1].cpu()[slots.cpu()[live]], stored_v.cpu()[live])
    untouched = torch.ones(48, dtype=torch.bool)
    untouched[slots.cpu()[live]] = False
    assert flat.cpu()[:, :, untouched].isnan().all() and flat[:layer].isnan().all()
    extent = arena[7:-5].view(layers, 2, span, width).cpu()
    kept = [0, 1, 10, 4, 5]
    assert torch.equal(extent[layer, 0, kept], stored_k[3:8].reshape(5, width).cpu())
    assert torch.equal(extent[layer, 1, kept], stored_v[3:8].reshape(5, width).cpu())
    assert int(arena.isnan().sum()) == arena.numel() - 2 * 5 * width


def test_write_kv_without_recording(device, triton, generator):
    pages = _pages(1, 2, 4, 2, 16, torch.float32, device)
    k, v = (normal((3, 2, 16), torch.float32, device, generator) for _ in range(2))
    cos, sin = angles(3, 16, device, generator)
    slots = torch.tensor([5, 0, 7], device=device)
    ignored = torch.zeros(3, dtype=torch.int64, device=device)
    write = gpu_rope.write_kv if triton else write_kv_reference
    write(k, v, cos, sin, pages[0, 0], pages[0, 1], slots, None, ignored, ignored, 0)
    assert torch.equal(pages[0, 1].view(8, 2, 16)[slots], v)


@pytest.mark.parametrize(("kv_heads", "dim"), SHAPES)
def test_rotate_scatter(device, triton, dtype, kv_heads, dim, generator):
    """Two spans of different length, out of order, in layers [1, 6) of 7."""
    layers, spans, width = 7, (13, 30), kv_heads * dim
    arena = normal((3 + sum(spans) * layers * 2 * width,), dtype, device, generator)
    starts = (3, 3 + spans[0] * layers * 2 * width)
    pages = _pages(layers, 9, 8, kv_heads, dim, dtype, device)
    picks = [(s, t) for s, n in enumerate(spans) for t in range(0, n, 2)]
    picks = [picks[i] for i in torch.randperm(len(picks), generator=generator).tolist()]
    base = torch.tensor([starts[s] + t * width for s, t in picks], device=device)
    tokens = torch.tensor([spans[s] for s, _ in picks], device=device)
    slots = torch.randperm(72, generator=generator)[: len(picks)]
    slots[1] = -1
    cos, sin = angles(len(picks), dim, device, generator)
    scatter = gpu_extents.rotate_scatter if triton else rotate_scatter_reference
    scatter(arena, pages, base, tokens, slots.to(device), cos, sin, 1, 6)
    flat = pages.view(layers, 2, 72, kv_heads, dim).cpu()
    for layer in range(1, 6):
        rows = torch.stack(
            [
                arena[starts[s] : starts[s] + spans[s] * layers * 2 * width]
                .view(layers, 2, spans[s], kv_heads, dim)[layer, :, t]
                .cpu()
                for s, t in picks
            ]
        )
        live = slots >= 0
        assert error(flat[layer, 0, slots[live]], _rotated(rows[:, 0], cos, sin)[live]) < rounding(dtype, device)
        assert torch.equal(flat[layer, 1, slots[live]], rows[live, 1])
    assert flat[0].isnan().all() and flat[6].isnan().all()
    assert int((~flat.isnan()).sum()) == (len(picks) - 1) * 5 * 2 * width


def test_hit_writes_the_same_bits_as_the_recording_request(device, triton, dtype, generator):
    """write_kv with recording, then rotate_scatter at the same positions: equal pages (a contract of the layout)."""
    rows, kv_heads, dim = 21, 2, 32
    width = kv_heads * dim
    k, v = (normal((rows, kv_heads, dim), dtype, device, generator).float() for _ in range(2))
    cos, sin = angles(rows, dim, device, generator)
    slots = torch.randperm(24, generator=generator)[:rows].to(device)
    base = (torch.arange(rows) * width).to(device)
    tokens = torch.full((rows,), rows, device=device)
    arena = torch.full((2 * rows * width,), float("nan"), dtype=dtype, device=device)
    fresh, hit = (_pages(1, 3, 8, kv_heads, dim, dtype, device) for _ in range(2))
    write = gpu_rope.write_kv if triton else write_kv_reference
    write(k, v, cos, sin, fresh[0, 0], fresh[0, 1], slots, arena, base, tokens, 0)
    scatter = gpu_extents.rotate_scatter if triton else rotate_scatter_reference
    scatter(arena, hit, base, tokens, slots, cos, sin, 0, 1)
    assert torch.equal(fresh.nan_to_num(9.0), hit.nan_to_num(9.0))


@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 16), (3, 8), (5, 512)])
def test_pack_unpack_and_gather(device, triton, dtype, kv_heads, dim, generator):
    layers, rows, width = 3, 23, kv_heads * dim
    pages = normal((layers, 2, 5, 8, kv_heads, dim), dtype, device, generator)
    slots = torch.randperm(40, generator=generator)[:rows].to(device)
    want = pages.view(layers, 2, 40, width)[:, :, slots]
    size = layers * 2 * rows * width
    arena = torch.full((size + 9,), float("nan"), dtype=dtype, device=device)
    (gpu_extents.pack_rows if triton else pack_rows_reference)(pages, slots, arena, 4)
    assert torch.equal(arena[4 : 4 + size].view(layers, 2, rows, width), want)
    assert int(arena.isnan().sum()) == 9
    back = _pages(layers, 5, 8, kv_heads, dim, dtype, device)
    (gpu_extents.unpack_rows if triton else unpack_rows_reference)(arena, 4, back, slots)
    assert torch.equal(back.view(layers, 2, 40, width)[:, :, slots], want)
    assert int((~back.isnan()).sum()) == size

    span = rows + 2
    extent = torch.full((span * layers * 2 * width,), float("nan"), dtype=dtype, device=device)
    place = torch.randperm(span, generator=generator)[:rows]
    gather = gpu_extents.gather_extent if triton else gather_extent_reference
    gather(pages, extent, slots, (place * width).to(device), torch.full((rows,), span, device=device), 1, 3)
    got = extent.view(layers, 2, span, width)
    assert torch.equal(got[1:3].cpu()[:, :, place], want[1:3].cpu())
    assert int((~got.isnan()).sum()) == 2 * 2 * rows * width


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offsets_past_two_to_the_31(generator):
    """Slots and extents whose element offsets need more than 31 bits (about 19 GB of device memory)."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free device memory")
    kv_heads, dim, rows, width = 4, 128, 50, 512
    pages = torch.empty((1, 2, 35_000, 128, kv_heads, dim), dtype=torch.bfloat16, device="cuda")  # 2 x 2.29e9
    arena = torch.empty(2**31 + 200_000, dtype=torch.bfloat16, device="cuda")
    base = (2**31 + 1_000 + torch.arange(rows) * width).cuda()
    tokens = torch.full((rows,), rows, device="cuda")
    slots = (35_000 * 128 - 1 - torch.randperm(100, generator=generator)[:rows]).cuda()
    values = normal((2, rows, kv_heads, dim), torch.bfloat16, "cuda", generator)
    arena[2**31 + 1_000 : 2**31 + 1_000 + values.numel()] = values.flatten()
    cos, sin = angles(rows, dim, "cuda", generator)
    gpu_extents.rotate_scatter(arena, pages, base, tokens, slots, cos, sin, 0, 1)
    got = pages[0].view(2, -1, kv_heads, dim)[:, slots]
    assert torch.equal(got[1], values[1])
    assert error(got[0], _rotated(values[0], cos, sin)) < rounding(torch.bfloat16, "cuda")
    arena.fill_(float("nan"))
    gpu_extents.pack_rows(pages, slots, arena, 2**31 + 3)
    assert torch.equal(arena[2**31 + 3 : 2**31 + 3 + values.numel()], got.flatten())
    none = torch.full((rows,), -1, device="cuda")
    gpu_rope.write_kv(values[1], values[0], cos, sin, pages[0, 0], pages[0, 1], slots, arena, none, none, 0)
    assert torch.equal(pages[0, 1].view(-1, kv_heads, dim)[slots], values[0])
