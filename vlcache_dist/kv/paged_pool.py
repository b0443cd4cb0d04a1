"""Blocks of the paged KV: who references which, and in which order free ones are handed out again. Pure, one owner
(the engine's thread).

A block without references is free. If a prefix cache adopted its contents, it stays findable until the block is
handed out again: blocks without contents go first, then the adopted ones, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks. ``free`` includes ``cached``: free ones whose contents a prefix cache still offers."""

    total: int
    free: int
    cached: int


class PagedPool:
    """Reference counts of blocks 0..num_blocks-1. Raises ValueError for misuse of a block that is not referenced."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, without contents; taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, adopted; least recently used first
        self._forget: dict[int, Callable[[int], None]] = {}  # adopted blocks, referenced or not

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with one reference each and no contents, or None (and nothing is taken) if too few are
        free. Adopted blocks that are handed out are forgotten by their cache first."""
        if count < 0:
            raise ValueError(f"{count} blocks")
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget.pop(block)(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block: referenced ones, and free ones that a cache still offers."""
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._cached:
                    raise ValueError(f"block {block} is free and has no contents to share")
                del self._cached[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of a sequence. The last block counts as the least recently used: a
        prefix loses its tail before its head."""
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} is not referenced")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._forget:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def adopt(self, block: int, forget: Callable[[int], None]) -> None:
        """A cache offers the contents of a referenced block from now on; ``forget(block)`` ends that, before the
        block is handed out again. A block has one cache at most."""
        if self._references[block] == 0 or block in self._forget:
            raise ValueError(f"block {block} is free or adopted already")
        self._forget[block] = forget

    def is_adopted(self, block: int) -> bool:
        return block in self._forget

    def references(self, block: int) -> int:
        return self._references[block]

    def drop_contents(self) -> None:
        """Forget every adopted block, as after a reload of weights; references stay."""
        for block, forget in self._forget.items():
            forget(block)
        self._forget.clear()
        self._blank += self._cached
        self._cached.clear()

    def stats(self) -> PoolStats:
        return PoolStats(self.num_blocks, self.num_free, len(self._cached))

    def validate(self) -> None:
        """Raise AssertionError unless every block is either referenced or free, exactly once."""
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {b for b, count in enumerate(self._references) if count == 0}, "free lists differ"
        assert all(count >= 0 for count in self._references), "negative reference count"
        assert set(self._cached) <= set(self._forget), "a free block with contents has no cache"
        assert not set(self._blank) & set(self._forget), "a blank block has a cache"
