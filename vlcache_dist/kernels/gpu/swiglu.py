"""The gated half of an MLP in one launch: both products and SwiGLU, so that gate and up never reach memory.

A program computes a tile of the gate and the same tile of the up product from one tile of the input, and writes their
SwiGLU. What it saves is a pass over [R, 2 I] and half of another; what it risks is a matrix product slower than the
library's. So it is used only for shapes in which it was measured to be ahead (``kernels.gpu.tuned``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vlcache_dist.kernels.gpu import device, tuned


@dataclass(frozen=True, slots=True)
class SwigluConfig:
    """``block_n`` outputs per tile, each of which takes two rows of the weight. ``persistent``: as many programs as
    multiprocessors, each of which takes tile after tile. ``group``: row tiles whose weights are read together."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    persistent: bool
    group: int = 8


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(
    x_desc, weight_desc, bias_ptr, out_ptr, rows, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row n of the weight is a gate, row n + OUTPUTS what it gates. Rows and columns past the end read as zero, or as
    those of the other half, and are not stored."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    kind = out_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        group = tile // (GROUP * column_tiles)
        height = tl.minimum(row_tiles - group * GROUP, GROUP)
        inside = tile % (GROUP * column_tiles)
        m0 = (group * GROUP + inside % height) * BLOCK_M
        n0 = inside // height * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, INPUTS, BLOCK_K):
            x = x_desc.load([m0, k])
            gate = tl.dot(x, tl.trans(weight_desc.load([n0, k])), gate, input_precision=PRECISION)
            up = tl.dot(x, tl.trans(weight_desc.load([n0 + OUTPUTS, k])), up, input_precision=PRECISION)
        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        if BIAS:
            gate += tl.load(bias_ptr + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + OUTPUTS + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
        gate = gate.to(kind).to(tl.float32)  # rounded, as it would be in memory
        e = tl.exp(-tl.abs(gate))
        value = gate * tl.where(gate >= 0, 1.0, e) / (1.0 + e) * up.to(kind).to(tl.float32)
        places = m.to(tl.int64)[:, None] * OUTPUTS + n[None, :]
        tl.store(out_ptr + places, value.to(kind), mask=(m < rows)[:, None] & (n < OUTPUTS)[None, :])


def chosen(x: torch.Tensor, gate_up: torch.Tensor) -> SwigluConfig | None:
    """How this product is fastest fused on this device; None where it was not seen to be ahead of the library."""
    known = tuned.choices(x).swiglu
    found = None if known is None else known.get((gate_up.shape[1], gate_up.shape[0] // 2))
    return SwigluConfig(**found[1]) if found is not None and len(x) >= found[0] else None


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None, config: SwigluConfig) -> torch.Tensor:
    """``kernels.linear.swiglu_reference``: x [R, C] -> [R, I]; gate_up contiguous, rows of x and of it a multiple of 16
    bytes. Raises ValueError otherwise."""
    rows, inputs = x.shape
    outputs = gate_up.shape[0] // 2
    if gate_up.shape[1] != inputs or not gate_up.is_contiguous() or inputs * x.element_size() % 16:
        raise ValueError(f"x {tuple(x.shape)} and a contiguous weight {tuple(gate_up.shape)} do not fit")
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    x, c = x.contiguous(), config
    tiles = triton.cdiv(rows, c.block_m) * triton.cdiv(outputs, c.block_n)
    programs = tiles
    if c.persistent:
        programs = min(tiles, device.processors(x.device.index or 0) if x.is_cuda else 4)
    _swiglu_kernel[(programs,)](
        TensorDescriptor(x, [rows, inputs], [inputs, 1], [c.block_m, c.block_k]),
        TensorDescriptor(gate_up, [2 * outputs, inputs], [inputs, 1], [c.block_n, c.block_k]),
        x if bias is None else bias, out, rows, OUTPUTS=outputs, INPUTS=inputs, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        BLOCK_K=c.block_k, GROUP=c.group, BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out


def compile_ahead(gate_up: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Compile what ``chosen`` may give for this weight, if anything."""
    known = tuned.choices(gate_up).swiglu
    found = None if known is None else known.get((gate_up.shape[1], gate_up.shape[0] // 2))
    if found is not None:
        swiglu(gate_up.new_zeros(1, gate_up.shape[1]), gate_up, bias, SwigluConfig(**found[1]))
