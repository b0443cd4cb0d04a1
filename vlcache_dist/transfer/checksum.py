"""What a range of an arena holds, in 16 bytes."""

from __future__ import annotations

import torch
from blake3 import blake3

CHECKSUM_BYTES = 16


def checksum(arena: torch.Tensor, offset: int, nbytes: int) -> bytes:
    """BLAKE3 of bytes [offset, offset + nbytes) of a 1-D arena. Device memory is copied to the host first."""
    part = arena.view(torch.uint8)[offset : offset + nbytes]
    return blake3(part.cpu().numpy().data).digest(CHECKSUM_BYTES)
