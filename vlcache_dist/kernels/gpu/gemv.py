"""One row times a weight matrix: what a decode step of one request spends its time on.

Reading the weights is all the work, so a program asks for its whole first tile of weights *before* it waits for the
kernel that makes its input (programmatic dependent launch): the memory stays busy from one product to the next, where
a library's kernels leave it idle for some microseconds each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vlcache_dist.kernels.gpu.device import pdl, supports_pdl


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """``block_n`` outputs and ``block_k`` inputs per tile; a program holds one tile and asks for the next."""

    block_n: int
    block_k: int
    warps: int


@triton.jit
def _dot(w, x):
    return tl.sum(w.to(tl.float32) * x[None, :], 1)


@triton.jit(do_not_specialize=["outputs"])
def _gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, outputs,
    INPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """GATED: row n of the weight is a gate, row n + outputs what it gates."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < outputs
    row = weight_ptr + n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    second = row + outputs.to(tl.int64) * INPUTS
    if PDL:
        gdc_launch_dependents()
    mask = inside[:, None] & (k < INPUTS)[None, :]
    ahead = tl.load(row, mask=mask, other=0.0)
    ahead2 = ahead
    if GATED:
        ahead2 = tl.load(second, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
    total = tl.zeros([BLOCK_N], tl.float32)
    total2 = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.static_range(0, INPUTS, BLOCK_K):
        w = ahead
        w2 = ahead2
        if start + BLOCK_K < INPUTS:
            mask = inside[:, None] & (start + BLOCK_K + k < INPUTS)[None, :]
            ahead = tl.load(row + start + BLOCK_K, mask=mask, other=0.0)
            if GATED:
                ahead2 = tl.load(second + start + BLOCK_K, mask=mask, other=0.0)
        x = tl.load(x_ptr + start + k, mask=start + k < INPUTS, other=0.0).to(tl.float32)
        total += _dot(w, x)
        if GATED:
            total2 += _dot(w2, x)
    kind = out_ptr.dtype.element_ty
    if BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = total.to(kind).to(tl.float32)
        e = tl.exp(-tl.abs(gate))
        total = gate * tl.where(gate >= 0, 1.0, e) / (1.0 + e) * total2.to(kind).to(tl.float32)
    tl.store(out_ptr + n, total.to(kind), mask=inside)


def default_config(inputs: int, gated: bool) -> GemvConfig:
    """The fastest of those tried on one H200 at 7B shapes (docs/kernels.md)."""
    if gated:
        return GemvConfig(2, 2048, 4)
    return GemvConfig(4, 2048, 4) if inputs <= 4096 else GemvConfig(2, 4096, 4)


def _gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool, config: GemvConfig | None
) -> torch.Tensor:
    inputs, outputs = weight.shape[1], weight.shape[0] // (2 if gated else 1)
    if x.shape != (1, inputs) or not weight.is_contiguous() or x.stride(1) != 1:
        raise ValueError(f"one dense row of {inputs} and a contiguous weight are expected, not {tuple(x.shape)}")
    c = config or default_config(inputs, gated)
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(outputs, c.block_n),)](
        x, weight, x if bias is None else bias, out, outputs, INPUTS=inputs, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        BIAS=bias is not None, GATED=gated, PDL=supports_pdl(x), num_warps=c.warps, **pdl(x),
    )  # fmt: skip
    return out


def gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, config: GemvConfig | None = None
) -> torch.Tensor:
    """``kernels.linear.linear_reference`` of one row: x [1, C] -> [1, O]."""
    return _gemv(x, weight, bias, False, config)


def gated_gemv(x: torch.Tensor, gate_up: torch.Tensor, *, config: GemvConfig | None = None) -> torch.Tensor:
    """``kernels.linear.swiglu_reference`` of one row: x [1, C] -> [1, I]."""
    return _gemv(x, gate_up, None, True, config)
