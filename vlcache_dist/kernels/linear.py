"""Products with a weight matrix, in torch. On a GPU one row has a kernel of its own (``kernels.gpu.gemv``), and
SwiGLU may be fused (``kernels.gpu.swiglu``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlcache_dist.kernels.activation import silu_mul_reference


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, C], weight [O, C], bias [O] -> [R, O]: products summed in fp32, one rounding."""
    return F.linear(x, weight, bias)


def swiglu_reference(x: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, C], gate_up [2*I, C] and bias [2*I], gate in the first half -> silu(x gate^T) * (x up^T) [R, I]; both
    products are rounded to x's dtype first."""
    return silu_mul_reference(F.linear(x, gate_up, bias))
