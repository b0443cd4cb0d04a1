"""What a range of bytes holds, in 16 bytes: two 64-bit sums over well-mixed 32-bit words.

A word ``w`` at index ``i`` is mixed with its index by bijections of 32 bits (the finalizer of MurmurHash3, then one
more step of the kind), and the results of both stages are summed modulo 2^64: a changed word changes the first sum for
certain, and words that moved, zeros that were lost and bytes of another object change either with all but a chance of
about 2^-64.
Sums do not depend on order, so a GPU computes them in parallel and every device comes to the same value. It finds
damage; it is no defence against forgers.
"""

from __future__ import annotations

import numpy as np
import torch

INDEX, MIX_1, MIX_2, MIX_3 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x2C1B3C6D
LENGTH = 0x9E3779B97F4A7C15
CHUNK = 1 << 15  #: words at a time: temporaries stay in the cache


def word_sums_reference(words: torch.Tensor) -> torch.Tensor:
    """words int32 [n], contiguous -> int64 [2], both sums modulo 2^64."""
    flat = words.cpu().numpy().view(np.uint32)
    index = np.arange(min(CHUNK, len(flat)), dtype=np.uint32)
    first = second = 0
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        x = index[: len(part)] + np.uint32(start & 0xFFFFFFFF)
        x *= np.uint32(INDEX)
        x ^= part
        y = x >> np.uint32(16)
        x ^= y
        x *= np.uint32(MIX_1)
        np.right_shift(x, np.uint32(13), out=y)
        x ^= y
        x *= np.uint32(MIX_2)
        np.right_shift(x, np.uint32(16), out=y)
        x ^= y
        first += int(x.sum(dtype=np.uint64))
        np.right_shift(x, np.uint32(15), out=y)
        x ^= y
        x *= np.uint32(MIX_3)
        np.right_shift(x, np.uint32(12), out=y)
        x ^= y
        second += int(x.sum(dtype=np.uint64))
    return torch.from_numpy(np.array([first % 2**64, second % 2**64], np.uint64).view(np.int64))


def digest(sums: torch.Tensor, nbytes: int) -> bytes:
    """16 bytes of ``word_sums`` over ``nbytes`` bytes (padded with zeros to whole words)."""
    first, second = (value % 2**64 for value in sums.tolist())
    return ((first + nbytes * LENGTH) % 2**64).to_bytes(8, "little") + second.to_bytes(8, "little")
