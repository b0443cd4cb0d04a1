"""Both products of SwiGLU in one launch, against fp64; and that it is used where it was measured to be ahead."""

from __future__ import annotations

import json

import pytest
import torch
from kernel_cases import error, normal

from vlcache_dist import kernels
from vlcache_dist.kernels import ops
from vlcache_dist.kernels.gpu import attention, tuned
from vlcache_dist.kernels.gpu import swiglu as gpu
from vlcache_dist.kernels.gpu.swiglu import SwigluConfig
from vlcache_dist.kernels.linear import swiglu_reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SMALL = {"block_m": 16, "block_n": 16, "block_k": 16, "warps": 4, "stages": 2, "persistent": False, "group": 2}
REPORT = {"chosen": {"attention": None, "swiglu": [{"inputs": 16, "outputs": 24, "from_rows": 5, "config": SMALL}]}}


def want(x, gate_up, bias=None):
    both = x.double() @ gate_up.double().T + (0 if bias is None else bias.double())
    gate, up = both.chunk(2, -1)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "biased", "persistent"),
    [(70, 48, 40, False, True), (70, 48, 40, True, False), (1, 16, 8, True, True), (33, 24, 7, False, False)],
)
def test_against_fp64(device, rows, inputs, outputs, biased, persistent, generator):
    """Sizes that are no multiples of a tile; more tiles than programs; groups that are not full."""
    dtypes = [torch.float16] + [torch.bfloat16, torch.float32] * (device == "cuda")
    config = SwigluConfig(**{**SMALL, "persistent": persistent})
    for dtype in dtypes:
        x = normal((rows, inputs), dtype, device, generator)
        gate_up = normal((2 * outputs, inputs), dtype, device, generator) / inputs**0.5
        bias = normal((2 * outputs,), dtype, device, generator) if biased else None
        got = gpu.swiglu(x, gate_up, bias, config)
        assert got.shape == (rows, outputs) and got.dtype == dtype
        assert error(got, want(x, gate_up, bias)) < TOLERANCE[dtype]
        assert error(swiglu_reference(x, gate_up, bias), want(x, gate_up, bias)) < TOLERANCE[dtype]


def test_large_gates_stay_finite(device):
    """exp would overflow on one side of zero."""
    x = torch.tensor([[200.0] * 8, [-200.0] * 8], device=device)
    got = gpu.swiglu(x, torch.ones(16, 8, device=device), None, SwigluConfig(**SMALL))
    assert got[0].eq(1600.0**2).all() and got[1].eq(0).all()


def test_no_rows_and_what_does_not_fit(device):
    config, weight = SwigluConfig(**SMALL), torch.zeros(16, 8, device=device)
    assert gpu.swiglu(torch.zeros(0, 8, device=device), weight, None, config).shape == (0, 8)
    for x, other in (
        (torch.zeros(2, 4), weight),
        (torch.zeros(2, 8), weight.T.contiguous().T),
        (torch.zeros(2, 3), torch.zeros(4, 3)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            gpu.swiglu(x.to(device), other.to(device), None, config)


def test_a_report_chooses_by_shape_and_rows(tmp_path, monkeypatch, generator):
    file = tmp_path / tuned.file_name("NVIDIA H200")
    assert file.name == "nvidia-h200.json" and tuned.read(file) == tuned.NOTHING
    file.write_text(json.dumps(REPORT))
    known = tuned.read(file)
    monkeypatch.setattr(tuned, "choices", lambda tensor: known)
    weight = normal((48, 16), torch.float16, "cpu", generator)
    assert gpu.chosen(torch.zeros(5, 16), weight) == SwigluConfig(**SMALL)
    assert gpu.chosen(torch.zeros(4, 16), weight) is None, "too few rows"
    assert gpu.chosen(torch.zeros(5, 16), weight[:32]) is None, "another shape"
    fused = []
    monkeypatch.setattr(gpu, "swiglu", lambda x, *rest: fused.append(len(x)) or swiglu_reference(x, *rest[:2]))
    monkeypatch.setattr(ops, "uses_triton", lambda tensor: True)
    monkeypatch.setattr(ops, "silu_mul", lambda both: both[:, :24])
    for rows in (4, 5, 9):
        assert kernels.swiglu(normal((rows, 16), torch.float16, "cpu", generator), weight).shape == (rows, 24)
    kernels.compile_swiglu(weight)
    kernels.compile_swiglu(weight[:32])
    assert fused == [5, 9, 1]


def test_a_report_chooses_launches_of_attention(monkeypatch):
    """For few rows on pages of the copy engine; everything else keeps its default."""
    fields = {"block_m": 16, "block_n": 64, "warps": 8, "stages": 2, "tma": True, "pdl": True, "early": True}
    known = tuned.Choices(fields, {})
    monkeypatch.setattr(tuned, "choices", lambda tensor: known)
    monkeypatch.setattr(attention.device, "is_hopper_or_later", lambda tensor: True)
    q = torch.zeros(1, 28, 128, dtype=torch.bfloat16)
    assert attention._config(q, 7, 128) == attention.AttentionConfig(**fields)
    for tensor, rows, block in ((q, 17, 128), (q, 7, 64), (q[..., :64], 7, 128), (q.float(), 7, 128)):
        default = attention.default_config(tensor.dtype, tensor.shape[-1], rows, block, True)
        assert attention._config(tensor, rows, block) == default


def test_nothing_is_chosen_where_nothing_was_measured():
    assert tuned.choices(torch.zeros(1)) == tuned.NOTHING
    assert gpu.chosen(torch.zeros(4096, 16), torch.zeros(48, 16)) is None
