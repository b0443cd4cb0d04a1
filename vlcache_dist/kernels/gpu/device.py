"""What the kernels ask about the device they are launched on."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=16)
def processors(index: int) -> int:
    """Streaming multiprocessors of CUDA device ``index``."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache(maxsize=16)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def is_hopper_or_later(tensor: torch.Tensor) -> bool:
    """True on CUDA devices with the bulk copy engine and programmatic dependent launch."""
    return tensor.is_cuda and _capability(tensor.device.index or 0) >= (9, 0)


supports_pdl = is_hopper_or_later


def pdl(tensor: torch.Tensor) -> dict[str, Any]:
    """The launch option by which a kernel may start while its predecessor runs; the kernel must wait for it."""
    return {"launch_pdl": True} if supports_pdl(tensor) else {}
