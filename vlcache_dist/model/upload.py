"""Host arrays to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGN = 16


def upload(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[torch.Tensor]:
    """One tensor per array, same shapes and dtypes.

    On CUDA all of them travel in one asynchronous copy from pinned memory and share its storage; the caching host
    allocator keeps the pinned block until the copy is done. On CPU they share the arrays' memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.nbytes // _ALIGN) * _ALIGN
    host = torch.empty(max(total, 1), dtype=torch.uint8, pin_memory=True)
    flat = host.numpy()
    for array, start in zip(arrays, starts, strict=True):
        flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(np.empty(0, array.dtype)).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]
