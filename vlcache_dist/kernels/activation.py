"""SwiGLU in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [R, 2*I], gate in the first half -> silu(gate) * up [R, I]: fp32 inside, one rounding."""
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)
