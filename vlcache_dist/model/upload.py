"""Host arrays to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGN = 16

Place = tuple[int, np.dtype, tuple[int, ...]]  #: byte offset, dtype, shape


def upload(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[torch.Tensor]:
    """One tensor per array, same shapes and dtypes.

    On CUDA all of them travel in one asynchronous copy from pinned memory and share its storage; the caching host
    allocator keeps the pinned block until the copy is done. On CPU they share the arrays' memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    places, total = _places(arrays)
    host = torch.empty(max(total, 1), dtype=torch.uint8, pin_memory=True)
    for view, array in zip(_host_views(host, places), arrays, strict=True):
        view[...] = array
    return _device_views(host.to(device, non_blocking=True), places)


class FixedInputs:
    """Arrays of fixed shapes that a captured graph reads at fixed device addresses. One thread owns it.

    Write into ``arrays`` (pinned host memory on CUDA) after ``wait``; ``send`` brings them to ``tensors`` in one
    asynchronous copy on the current stream. Both start as zeros.
    """

    def __init__(self, example: Sequence[np.ndarray], device: torch.device) -> None:
        """Shapes and dtypes are those of ``example``; its values are not taken."""
        places, total = _places(example)
        cuda = device.type == "cuda"
        self._host = torch.zeros(max(total, 1), dtype=torch.uint8, pin_memory=cuda)
        self._there = torch.zeros(max(total, 1), dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if cuda else None
        self.arrays = _host_views(self._host, places)
        self.tensors = _device_views(self._there, places)

    def wait(self) -> None:
        """Until the last copy has read the host's side."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self) -> None:
        self._there.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _places(arrays: Sequence[np.ndarray]) -> tuple[list[Place], int]:
    """Where each array begins, on multiples of 16 bytes, and the bytes of all."""
    places, total = [], 0
    for array in arrays:
        places.append((total, array.dtype, array.shape))
        total += -(-array.nbytes // _ALIGN) * _ALIGN
    return places, total


def _host_views(host: torch.Tensor, places: Sequence[Place]) -> list[np.ndarray]:
    flat = host.numpy()
    return [flat[start : start + _size(dtype, shape)].view(dtype).reshape(shape) for start, dtype, shape in places]


def _device_views(there: torch.Tensor, places: Sequence[Place]) -> list[torch.Tensor]:
    return [
        there[start : start + _size(dtype, shape)].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)
        for start, dtype, shape in places
    ]


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))
