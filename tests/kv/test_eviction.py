"""Victims are as old as possible, then as few as possible."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_dist.kv.eviction import choose_victims


@st.composite
def arenas(draw):
    """(free, evictable in a random age order) of an arena cut into pieces, some of them immovable."""
    free, evictable, start, was_free = [], [], 0, False
    for size in draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)):
        what = draw(st.sampled_from(["evictable", "fixed"] if was_free else ["free", "evictable", "fixed"]))
        if what == "free":
            free.append((start, size))
        elif what == "evictable":
            evictable.append((start, size))
        was_free = what == "free"
        start += size
    return free, draw(st.permutations(evictable))


def largest_hole(extents):
    best, start, end = 0, 0, 0
    for a, size in sorted(extents):
        if a != end:
            start = a
        end = a + size
        best = max(best, end - start)
    return best


@given(arenas(), st.integers(1, 40))
@settings(max_examples=400, derandomize=True)
def test_victims(arena, needed):
    free, oldest_first = arena
    if largest_hole(free) >= needed:
        return  # the store asks only when nothing fits
    victims = choose_victims(needed, free, oldest_first)
    prefixes = [oldest_first[:k] for k in range(1, len(oldest_first) + 1)]
    enough = [old for old in prefixes if largest_hole(free + old) >= needed]
    if not enough:
        assert victims is None
        return
    old = dict(enough[0])
    assert set(victims) <= set(old), "younger than necessary"
    chosen = {start: old[start] for start in victims}
    assert largest_hole(free + list(chosen.items())) >= needed
    for start in chosen:
        rest = [item for item in chosen.items() if item[0] != start]
        assert largest_hole(free + rest) < needed, "one of them need not go"


def test_fewest_elements_of_the_hole_that_opens():
    # [free 2][A 5][free 4][B 1][free 3]: for 8 contiguous elements B is enough, though A is older.
    free = [(0, 2), (7, 4), (12, 3)]
    assert choose_victims(8, free, [(11, 1), (2, 5)]) == [11]
    assert choose_victims(8, free, [(2, 5), (11, 1)]) == [2]
    assert choose_victims(15, free, [(2, 5), (11, 1)]) == [2, 11]
    assert choose_victims(16, free, [(2, 5), (11, 1)]) is None
