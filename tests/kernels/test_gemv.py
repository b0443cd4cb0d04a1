"""One row times a matrix: the torch definition and the Triton kernel against fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import error, normal

from vlcache_dist import kernels
from vlcache_dist.kernels.gpu import gemv as gpu
from vlcache_dist.kernels.gpu.gemv import GemvConfig
from vlcache_dist.kernels.linear import linear_reference, swiglu_reference

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
CONFIGS = pytest.mark.parametrize("config", [None, GemvConfig(2, 16, 1), GemvConfig(8, 64, 4)])
SIZES = pytest.mark.parametrize(("inputs", "outputs"), [(48, 7), (128, 1), (33, 20), (80, 64)])


def _dtypes(device: str) -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16] if device == "cuda" else [torch.float16]


@CONFIGS
@SIZES
@pytest.mark.parametrize("biased", [False, True])
def test_gemv(device, inputs, outputs, biased, config, generator):
    for dtype in _dtypes(device):
        x, weight = normal((1, inputs), dtype, device, generator), normal((outputs, inputs), dtype, device, generator)
        bias = normal((outputs,), dtype, device, generator) if biased else None
        want = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
        got = gpu.gemv(x, weight, bias, config=config)
        assert got.shape == (1, outputs) and got.dtype == dtype and error(got, want) < TOLERANCE[dtype]
        assert error(linear_reference(x, weight, bias), want) < TOLERANCE[dtype]


@CONFIGS
@SIZES
def test_gated_gemv(device, inputs, outputs, config, generator):
    for dtype in _dtypes(device):
        x = normal((1, inputs), dtype, device, generator)
        gate_up = normal((2 * outputs, inputs), dtype, device, generator) / inputs**0.5
        gate, up = (x.double() @ gate_up.double().T).chunk(2, -1)
        want = gate * gate.sigmoid() * up
        assert error(gpu.gated_gemv(x, gate_up, config=config), want) < 2 * TOLERANCE[dtype]
        assert error(swiglu_reference(x, gate_up), want) < 2 * TOLERANCE[dtype]


def test_several_rows_are_refused_by_the_kernel_and_served_by_the_function(device, generator):
    x, weight = (normal((4, 16), torch.float16, device, generator) for _ in range(2))
    with pytest.raises(ValueError, match="one dense row"):
        gpu.gemv(x, weight, None)
    want = x.double() @ weight.double().T
    assert error(kernels.linear(x, weight), want) < TOLERANCE[torch.float16]
    assert error(kernels.linear(x[:1], weight), want[:1]) < TOLERANCE[torch.float16]
    halved = kernels.swiglu(x, weight)
    assert error(kernels.swiglu(x[:1], weight), halved[:1]) < 2 * TOLERANCE[torch.float16]
