"""RMSNorm (with and without residual) and SwiGLU. On Hopper they start by programmatic dependent launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vlcache_dist.kernels.gpu.device import pdl, supports_pdl


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, columns, eps,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if PDL:  # the weight is older than the previous kernel
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * columns + column, x, mask=mask)
    h = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, 0) / columns + eps)
    normed = (h * scale).to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * columns + column, normed.to(out_ptr.dtype.element_ty), mask=mask)


def _warps(columns: int) -> int:
    return 4 if columns <= 2048 else 8


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``kernels.norm.rms_norm_reference``."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, rows, weight, out, out, rows.stride(0), 0, columns, eps,
            BLOCK=triton.next_power_of_2(columns), RESIDUAL=False, PDL=supports_pdl(x),
            num_warps=_warps(columns), **pdl(x),
        )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.norm.add_rms_norm_reference``."""
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    total = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if rows:
        _rms_norm_kernel[(rows,)](
            x, residual, weight, out, total, x.stride(0), residual.stride(0), columns, eps,
            BLOCK=triton.next_power_of_2(columns), RESIDUAL=True, PDL=supports_pdl(x),
            num_warps=_warps(columns), **pdl(x),
        )  # fmt: skip
    return out, total


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, inner, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    gate = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + inner + column, mask=mask, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(gate))
    out = gate * tl.where(gate >= 0, 1.0, e) / (1.0 + e) * up
    tl.store(out_ptr + row * inner + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``kernels.activation.silu_mul_reference``."""
    inner = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * inner)
    out = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype, device=gate_up.device)
    if rows.shape[0]:
        _silu_mul_kernel[(rows.shape[0], triton.cdiv(inner, 2048))](
            rows, out, rows.stride(0), inner, BLOCK=2048, PDL=supports_pdl(rows), num_warps=8, **pdl(rows)
        )
    return out
