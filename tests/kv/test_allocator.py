"""Extents never overlap, free ones are merged, and an allocation fails only when no hole is large enough."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vlcache_dist.kv.allocator import ExtentAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """Against a list of owners, one per element."""

    @initialize(total=st.integers(8, 70), alignment=st.sampled_from([1, 2, 4, 8]))
    def start(self, total, alignment):
        self.allocator = ExtentAllocator(total, alignment)
        self.alignment = alignment
        self.owners = [None] * (total // alignment * alignment)
        self.extents = {}

    def holes(self):
        runs, length = [], 0
        for owner in [*self.owners, "end"]:
            if owner is None:
                length += 1
            elif length:
                runs.append(length)
                length = 0
        return runs

    @rule(elements=st.integers(1, 40))
    def allocate(self, elements):
        size = -(-elements // self.alignment) * self.alignment
        fitting = [hole for hole in self.holes() if hole >= size]
        start = self.allocator.allocate(elements)
        if start is None:
            assert not fitting
            return
        assert start % self.alignment == 0
        assert self.owners[start : start + size] == [None] * size
        assert self.allocator.size_of(start) == size
        # Best fit: the hole it lay in was the smallest that was large enough.
        left = right = start
        while left > 0 and self.owners[left - 1] is None:
            left -= 1
        while right < len(self.owners) and self.owners[right] is None:
            right += 1
        assert right - left == min(fitting)
        self.owners[start : start + size] = [start] * size
        self.extents[start] = size

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def free(self, data):
        start = data.draw(st.sampled_from(sorted(self.extents)))
        self.allocator.free(start)
        size = self.extents.pop(start)
        self.owners[start : start + size] = [None] * size

    @rule(start=st.integers(-1, 70))
    def free_what_is_not_allocated(self, start):
        if start not in self.extents:
            with pytest.raises(ValueError):
                self.allocator.free(start)

    @invariant()
    def agrees(self):
        if not hasattr(self, "allocator"):
            return
        self.allocator.validate()
        stats, holes = self.allocator.stats(), self.holes()
        assert stats.free == sum(holes)
        assert stats.largest_free == max(holes, default=0)
        assert stats.num_free_extents == len(holes)
        assert stats.num_allocated == len(self.extents)
        assert stats.fragmentation == (1 - max(holes) / sum(holes) if holes else 0)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_bad_sizes_are_refused():
    for total, alignment in [(0, 1), (3, 4), (8, 0)]:
        with pytest.raises(ValueError):
            ExtentAllocator(total, alignment)
    with pytest.raises(ValueError):
        ExtentAllocator(8).allocate(0)
