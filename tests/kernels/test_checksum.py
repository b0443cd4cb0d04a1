"""Checksums: the same value on every device, and another one for every kind of damage."""

from __future__ import annotations

import pytest
import torch

from vlcache_dist.kernels.checksum import CHUNK, INDEX, MIX_1, MIX_2, MIX_3, digest, word_sums_reference
from vlcache_dist.kernels.gpu.checksum import BLOCK, BLOCKS_PER_PROGRAM, word_sums
from vlcache_dist.transfer.checksum import CHECKSUM_BYTES, checksum

SHARE = BLOCK * BLOCKS_PER_PROGRAM


def words(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int32)


def by_definition(values: torch.Tensor) -> list[int]:
    first = second = 0
    for index, word in enumerate(values.tolist()):
        x = (word % 2**32) ^ (index * INDEX % 2**32)
        x ^= x >> 16
        x = x * MIX_1 % 2**32
        x ^= x >> 13
        x = x * MIX_2 % 2**32
        x ^= x >> 16
        first += x
        x ^= x >> 15
        x = x * MIX_3 % 2**32
        x ^= x >> 12
        second += x
    return [value - 2**64 if value >= 2**63 else value for value in (first % 2**64, second % 2**64)]


def test_the_reference_is_what_is_written(generator: torch.Generator) -> None:
    for count in (0, 1, 5, 1000, CHUNK + 3):
        values = words(count, generator)
        assert word_sums_reference(values).tolist() == by_definition(values)


@pytest.mark.parametrize("count", [1, 31, BLOCK, SHARE - 1, SHARE, 2 * SHARE + 77])
def test_the_kernel_agrees(count: int, device: str, generator: torch.Generator) -> None:
    values = words(count, generator)
    assert word_sums(values.to(device)).tolist() == word_sums_reference(values).tolist()


def test_every_kind_of_damage_shows(generator: torch.Generator) -> None:
    arena = words(4096, generator).view(torch.uint8)
    arena[2048:4096] = 0
    before = checksum(arena, 0, len(arena))
    seen = {before}
    assert len(before) == CHECKSUM_BYTES

    def changed(damage: torch.Tensor) -> None:
        after = checksum(damage, 0, len(damage))
        assert after not in seen
        seen.add(after)

    for bit in range(8):
        for place in (0, 1, 2, 3, 777, 3000, len(arena) - 1):
            damaged = arena.clone()
            damaged[place] ^= 1 << bit
            changed(damaged)
    for shift in (1, 2, 4, 256):  # bytes that moved, among them blocks that changed places
        changed(arena.roll(shift))
        swapped = arena.clone()
        swapped[:shift], swapped[5000 : 5000 + shift] = arena[5000 : 5000 + shift].clone(), arena[:shift].clone()
        changed(swapped)
    late = arena.clone()
    late[8192:] = 0  # the second half has not arrived
    changed(late)
    changed(arena[:-4])
    changed(torch.cat([arena, torch.zeros(4, dtype=torch.uint8)]))


def test_ranges_that_are_no_whole_words(generator: torch.Generator) -> None:
    arena = words(64, generator).view(torch.uint8)
    for offset, nbytes in ((0, 6), (2, 10), (4, 12), (6, 8), (3, 1), (8, 0)):
        padded = torch.zeros(-(-nbytes // 4) * 4, dtype=torch.uint8)
        padded[:nbytes] = arena[offset : offset + nbytes]
        assert checksum(arena, offset, nbytes) == digest(word_sums_reference(padded.view(torch.int32)), nbytes)
