"""Where page slots come from: which object's rows they equal, until they are computed."""

from __future__ import annotations

import numpy as np

from vlcache_dist.engine import origins
from vlcache_dist.engine.origins import SlotOrigins

A, B = b"a" * 32, b"b" * 32
OLD, NEW = b"1" * 16, b"2" * 16


def test_most_slots_decide_between_variants() -> None:
    book, slots = SlotOrigins(20), np.arange(4, 14)
    assert book.derived(slots, A) is None
    book.set(slots, A, OLD)
    book.set(slots[:4], A, NEW)
    variant, which = book.derived(slots, A)
    assert variant == OLD and which.tolist() == [False] * 4 + [True] * 6
    book.set(slots[:7], A, NEW)
    variant, which = book.derived(slots, A)
    assert variant == NEW and which.tolist() == [True] * 7 + [False] * 3


def test_computed_slots_and_other_keys_do_not_count() -> None:
    book, slots = SlotOrigins(20), np.arange(4, 14)
    book.set(slots, A, OLD)
    book.set(slots[2:], B, NEW)
    book.clear(slots[1:2])
    variant, which = book.derived(slots, A)
    assert variant == OLD and which.tolist() == [True] + [False] * 9
    book.clear(slots)
    assert book.derived(slots, A) is None and book.derived(slots, B) is None


def test_names_of_slots_that_were_overwritten_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(origins, "_PRUNE_AT", 4)
    book, slots = SlotOrigins(8), np.arange(8)
    for number in range(100):
        book.set(slots[:4], A, number.to_bytes(16, "big"))
        book.set(slots[4:], B, number.to_bytes(16, "big"))
        assert len(book._names) == len(book._numbers) <= 6
        for half, key in ((slots[:4], A), (slots[4:], B)):
            variant, which = book.derived(half, key)
            assert variant == number.to_bytes(16, "big") and which.all()
