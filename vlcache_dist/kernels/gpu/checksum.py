"""Word sums of a range of device memory: read once, at the memory's speed. See ``kernels.checksum``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlcache_dist.kernels.checksum import INDEX, MIX_1, MIX_2, MIX_3

BLOCK, BLOCKS_PER_PROGRAM = 4096, 8


@triton.jit(do_not_specialize=["count"])
def _word_sums_kernel(
    words_ptr, sums_ptr, count,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): each adds its share's two sums to ``sums`` int64 [2]."""
    first = tl.zeros([BLOCK], tl.int64)
    second = tl.zeros([BLOCK], tl.int64)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    for block in range(BLOCKS):
        index = start + block * BLOCK + tl.arange(0, BLOCK)
        live = index < count
        x = tl.load(words_ptr + index, mask=live, other=0).to(tl.uint32, bitcast=True)
        x = x ^ (index.to(tl.uint32) * A)
        x = x ^ (x >> 16)
        x = x * B
        x = x ^ (x >> 13)
        x = x * C
        x = x ^ (x >> 16)
        first += tl.where(live, x.to(tl.int64), 0)
        x = x ^ (x >> 15)
        x = x * D
        x = x ^ (x >> 12)
        second += tl.where(live, x.to(tl.int64), 0)
    tl.atomic_add(sums_ptr, tl.sum(first))
    tl.atomic_add(sums_ptr + 1, tl.sum(second))


def word_sums(words: torch.Tensor) -> torch.Tensor:
    """See ``checksum.word_sums_reference``; does not wait."""
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)
    if words.numel():
        grid = (triton.cdiv(words.numel(), BLOCK * BLOCKS_PER_PROGRAM),)
        _word_sums_kernel[grid](
            words, sums, words.numel(), INDEX, MIX_1, MIX_2, MIX_3, BLOCK=BLOCK, BLOCKS=BLOCKS_PER_PROGRAM, num_warps=8
        )
    return sums
