"""Which implementation a call takes: Triton on CUDA tensors, the torch reference everywhere else.

Under ``TRITON_INTERPRET=1`` tests call the Triton functions in ``kernels.gpu`` directly; this switch never selects
them for CPU tensors.
"""

from __future__ import annotations

import importlib.util

import torch

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_enabled = True


def enable_triton(enabled: bool) -> None:
    """Allow (default) or forbid the Triton kernels on CUDA tensors, process-wide. Not to be changed under a captured
    CUDA graph: a graph keeps what it captured."""
    global _enabled
    _enabled = enabled


def uses_triton(tensor: torch.Tensor) -> bool:
    """True where a call whose first tensor is ``tensor`` runs a Triton kernel."""
    return tensor.is_cuda and _enabled and _HAS_TRITON
