"""Which page slots hold what an image object holds, rotated: what need not travel from prefill to decode. Pure.

Blocks are shared through the prefix caches, so this is known per slot and not per request: a sequence that starts with
another one's blocks can still say which of its rows follow from which object.
"""

from __future__ import annotations

import numpy as np

from vlcache_dist.types import ContentKey, Variant

_PRUNE_AT = 4096  #: names kept before unused ones are looked for


class SlotOrigins:
    """A number per slot: 0 where the KV was computed here, else the name of the object it was copied from, or that was
    recorded from it."""

    def __init__(self, num_slots: int) -> None:
        self._origin = np.zeros(num_slots, np.int64)
        self._numbers: dict[tuple[ContentKey, Variant], int] = {}
        self._names: dict[int, tuple[ContentKey, Variant]] = {}
        self._next = 1
        self._prune_at = _PRUNE_AT

    def set(self, slots: np.ndarray, key: ContentKey, variant: Variant) -> None:
        """These slots equal the object's rows for their tokens, bit for bit."""
        name = (key, variant)
        number = self._numbers.get(name)
        if number is None:
            if len(self._names) >= self._prune_at:
                self._prune()
            number = self._numbers[name] = self._next
            self._names[number] = name
            self._next += 1
        self._origin[slots] = number

    def clear(self, slots: np.ndarray) -> None:
        """These slots were computed."""
        self._origin[slots] = 0

    def derived(self, slots: np.ndarray, key: ContentKey) -> tuple[Variant, np.ndarray] | None:
        """The variant of ``key`` that most of a span's slots come from, and bool [len(slots)]: which. None: none."""
        numbers, counts = np.unique(self._origin[slots], return_counts=True)
        for number in numbers[np.argsort(-counts)].tolist():
            if number and self._names[number][0] == key:
                return self._names[number][1], self._origin[slots] == number
        return None

    def _prune(self) -> None:
        used = set(np.unique(self._origin).tolist())
        self._names = {number: name for number, name in self._names.items() if number in used}
        self._numbers = {name: number for number, name in self._names.items()}
        self._prune_at = max(_PRUNE_AT, 2 * len(self._names))
