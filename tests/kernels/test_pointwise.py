from __future__ import annotations

import pytest
import torch
from kernel_cases import error, normal, rounding

from vlcache_dist.kernels.activation import silu_mul_reference
from vlcache_dist.kernels.gpu import pointwise as gpu
from vlcache_dist.kernels.norm import add_rms_norm_reference, rms_norm_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(params=["torch", "triton"])
def triton(request):
    return request.param == "triton"


@DTYPES
@pytest.mark.parametrize("shape", [(5, 33), (1, 128), (2, 3, 100)])
def test_rms_norm(device, triton, dtype, shape, generator):
    x = normal(shape, dtype, device, generator) * 3
    weight = normal(shape[-1:], dtype, device, generator)
    wide = x.double()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    got = (gpu.rms_norm if triton else rms_norm_reference)(x, weight, 1e-6)
    assert got.dtype == dtype and error(got, want) < 2 * rounding(dtype, device)


@DTYPES
def test_add_rms_norm(device, triton, dtype, generator):
    x, residual = (normal((7, 65), dtype, device, generator) for _ in range(2))
    weight = normal((65,), dtype, device, generator)
    before = x.clone(), residual.clone()
    got, total = (gpu.add_rms_norm if triton else add_rms_norm_reference)(x, residual, weight, 1e-5)
    wide = x.double() + residual.double()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert error(total, x + residual) < rounding(dtype, device) and error(got, want) < 2 * rounding(dtype, device)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@DTYPES
@pytest.mark.parametrize("shape", [(5, 66), (3, 2 * 2049), (2, 3, 20)])
def test_silu_mul(device, triton, dtype, shape, generator):
    x = normal(shape, dtype, device, generator) * 4
    gate, up = x.double().chunk(2, -1)
    got = (gpu.silu_mul if triton else silu_mul_reference)(x)
    assert got.dtype == dtype and error(got, gate * gate.sigmoid() * up) < 2 * rounding(dtype, device)


def test_silu_mul_of_extreme_gates_is_finite(device, triton):
    x = torch.tensor([[-1e4, 1e4, -200.0, 2.0, 3.0, 4.0]], device=device)
    got = (gpu.silu_mul if triton else silu_mul_reference)(x)
    assert got.tolist() == [[0.0, 3e4, 0.0]]
