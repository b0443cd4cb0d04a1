"""What a range of an arena holds, in 16 bytes (``kernels.checksum``): the same on every device."""

from __future__ import annotations

import threading

import torch

from vlcache_dist import kernels
from vlcache_dist.kernels.checksum import digest

CHECKSUM_BYTES = 16
WORD = 4

_streams: dict[int, torch.cuda.Stream] = {}
_lock = threading.Lock()


def checksum(arena: torch.Tensor, offset: int, nbytes: int) -> bytes:
    """Of bytes [offset, offset + nbytes) of a 1-D arena. Waits for the result; on CUDA beside whatever else the device
    does, so the bytes must be there already (a committed object's, or those of a READ that has ended)."""
    part = arena.view(torch.uint8)[offset : offset + nbytes]
    if not part.is_cuda:
        return digest(kernels.word_sums(_words(part)), nbytes)
    with torch.cuda.stream(_stream(part.device)):
        return digest(kernels.word_sums(_words(part)), nbytes)


def _words(part: torch.Tensor) -> torch.Tensor:
    """int32 words of a byte range; copied only if it does not begin or end with a whole word."""
    if part.storage_offset() % WORD == 0 and part.numel() % WORD == 0:
        return part.view(torch.int32)
    padded = torch.zeros(-(-part.numel() // WORD) * WORD, dtype=torch.uint8, device=part.device)
    padded[: part.numel()] = part
    return padded.view(torch.int32)


def _stream(device: torch.device) -> torch.cuda.Stream:
    index = device.index or 0
    with _lock:
        if index not in _streams:
            _streams[index] = torch.cuda.Stream(device, priority=-1)
        return _streams[index]
