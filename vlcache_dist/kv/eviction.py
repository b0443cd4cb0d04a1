"""Which objects must go so that a contiguous extent becomes free. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def choose_victims(
    needed: int, free: Iterable[tuple[int, int]], oldest_first: Iterable[tuple[int, int]]
) -> list[int] | None:
    """Starts of the extents to evict for a hole of ``needed`` elements, or None if no eviction makes one.

    ``free`` and ``oldest_first`` (the evictable extents) are (start, size) pairs of one arena. No extent is chosen
    that is younger than the first one to complete a hole; of the older ones only those stay in the choice that the
    hole needs, fewest elements first. So fragmentation never empties half a cache for one object.
    """
    size_at = dict(free)
    start_of_end = {start + size: start for start, size in size_at.items()}
    considered: dict[int, int] = {}
    for start, size in oldest_first:
        considered[start] = size
        end = start + size
        if (left := start_of_end.pop(start, None)) is not None:
            del size_at[left]
            start = left
        if (right := size_at.pop(end, None)) is not None:
            del start_of_end[end + right]
            end += right
        size_at[start] = end - start
        start_of_end[end] = start
        if end - start >= needed:
            inside = sorted((s, n) for s, n in considered.items() if start <= s < end)
            return _cheapest_window(needed, start, end, inside)
    return None


def _cheapest_window(needed: int, start: int, end: int, victims: list[tuple[int, int]]) -> list[int]:
    """The run of neighbouring victims with the fewest elements whose eviction leaves ``needed`` contiguous ones in
    the hole [start, end)."""
    best: tuple[int, int, int] | None = None
    last, cost = -1, 0
    for first in range(len(victims)):
        left = start if first == 0 else sum(victims[first - 1])
        while last < len(victims) - 1 and (last < first or victims[last + 1][0] - left < needed):
            last += 1
            cost += victims[last][1]
        right = end if last == len(victims) - 1 else victims[last + 1][0]
        if right - left >= needed and (best is None or cost < best[0]):
            best = (cost, first, last)
        cost -= victims[first][1]
    assert best is not None, "the whole hole is a window that is large enough"
    return [victim for victim, _ in victims[best[1] : best[2] + 1]]
