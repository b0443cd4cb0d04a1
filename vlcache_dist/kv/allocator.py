"""Contiguous extents in a flat range of elements: best fit, immediate coalescing. Pure bookkeeping, one owner.

Free extents are indexed by start and end (coalescing in O(1)) and in one list sorted by size and start (best fit by
bisection). Images are large and few, so that list is short; inserting into it is one ``memmove``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AllocatorStats:
    """Elements. ``fragmentation`` is the share of free elements outside the largest free extent."""

    total: int
    free: int
    largest_free: int
    num_free_extents: int
    num_allocated: int

    @property
    def fragmentation(self) -> float:
        return 1.0 - self.largest_free / self.free if self.free else 0.0


class ExtentAllocator:
    """Hands out disjoint extents of [0, total); starts and sizes are multiples of ``alignment`` elements.

    ``total`` is rounded down to the alignment, sizes are rounded up. Raises ValueError for sizes and alignments
    below one and for freeing what is not allocated.
    """

    def __init__(self, total: int, alignment: int = 1) -> None:
        if alignment < 1 or total < alignment:
            raise ValueError(f"{total} elements with alignment {alignment}")
        self.alignment = alignment
        self.total = total // alignment * alignment
        self.free_elements = self.total
        self._allocated: dict[int, int] = {}  # start -> size
        self._free: dict[int, int] = {0: self.total}  # start -> size
        self._free_ends: dict[int, int] = {self.total: 0}  # end -> start
        self._by_size: list[tuple[int, int]] = [(self.total, 0)]

    def rounded(self, elements: int) -> int:
        """What an allocation of ``elements`` occupies."""
        if elements < 1:
            raise ValueError(f"an extent of {elements} elements")
        return -(-elements // self.alignment) * self.alignment

    @property
    def largest_free(self) -> int:
        return self._by_size[-1][0] if self._by_size else 0

    def allocate(self, elements: int) -> int | None:
        """Start of a new extent, or None if no free extent is large enough."""
        size = self.rounded(elements)
        index = bisect_left(self._by_size, (size, 0))
        if index == len(self._by_size):
            return None
        found, start = self._by_size[index]
        self._take(start, found)
        if found > size:
            self._give(start + size, found - size)
        self._allocated[start] = size
        self.free_elements -= size
        return start

    def free(self, start: int) -> None:
        """Return the extent at ``start`` and merge it with free neighbours."""
        size = self._allocated.pop(start, None)
        if size is None:
            raise ValueError(f"no extent is allocated at {start}")
        self.free_elements += size
        end = start + size
        if (left := self._free_ends.get(start)) is not None:
            self._take(left, start - left)
            start = left
        if (right := self._free.get(end)) is not None:
            self._take(end, right)
            end += right
        self._give(start, end - start)

    def size_of(self, start: int) -> int:
        """Elements that the allocated extent at ``start`` occupies. Raises KeyError."""
        return self._allocated[start]

    def free_extents(self) -> Iterator[tuple[int, int]]:
        """(start, size) of every free extent, in no particular order."""
        return iter(self._free.items())

    def stats(self) -> AllocatorStats:
        return AllocatorStats(self.total, self.free_elements, self.largest_free, len(self._free), len(self._allocated))

    def validate(self) -> None:
        """Raise AssertionError unless free and allocated extents tile [0, total) and the indices agree."""
        position, previous_free = 0, False
        for start, size, is_free in sorted(
            [(s, n, True) for s, n in self._free.items()] + [(s, n, False) for s, n in self._allocated.items()]
        ):
            assert start == position, f"gap or overlap at {position}: next extent starts at {start}"
            assert size > 0 and size % self.alignment == 0, f"extent at {start} has size {size}"
            assert not (is_free and previous_free), f"free extents at {start} were not merged"
            position, previous_free = start + size, is_free
        assert position == self.total, f"extents end at {position}, not at {self.total}"
        assert self.free_elements == sum(self._free.values()), "free count differs from the free extents"
        assert self._by_size == sorted((n, s) for s, n in self._free.items()), "size index differs"
        assert self._free_ends == {s + n: s for s, n in self._free.items()}, "end index differs"

    def _take(self, start: int, size: int) -> None:
        del self._free[start], self._free_ends[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]

    def _give(self, start: int, size: int) -> None:
        self._free[start] = size
        self._free_ends[start + size] = start
        insort(self._by_size, (size, start))
