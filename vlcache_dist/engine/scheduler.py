"""Which sequences a step works on, and how far. Pure: no torch, no clock.

Decoding sequences come first, one row each, so that a long prompt never stalls answers; prompts share the rest of the
step's rows, first come first served, in chunks that may end anywhere, in the middle of an image too. Only rows that
are computed count: reused tokens are free.

A few rows in front of a span whose source is still awaited are not worth a pass of their own, which costs the reading
of all weights: they are computed together with what follows the span. Rows that are recorded do not wait, since other
requests may wait for the record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from vlcache_dist.engine.batch import ChunkWork
from vlcache_dist.engine.sequence import Sequence
from vlcache_dist.errors import ConfigError

WORTHWHILE_ROWS = 256  #: below it a forward pass takes about as long as with a single row


class Scheduler:
    """``max_batch_tokens`` bounds the rows of a step; it must exceed ``max_running``, so that prompts advance while
    every other sequence decodes."""

    def __init__(self, max_batch_tokens: int, max_running: int) -> None:
        if max_batch_tokens <= max_running:
            raise ConfigError(
                f"max_batch_tokens = {max_batch_tokens}: must exceed max_sequences = {max_running}, or prompts starve"
            )
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.hold_back = True  #: let few rows wait for the source that is missing behind them

    def next_waiting(self) -> Sequence | None:
        """The request to admit next, None if there is none or no place."""
        return self.waiting[0] if self.waiting and len(self.running) < self.max_running else None

    def admitted(self) -> None:
        """The head of the queue owns its blocks now."""
        self.running.append(self.waiting.popleft())

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError if it is neither waiting nor running."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[tuple[Sequence, ChunkWork]]:
        """This step's work; empty if every running sequence waits for something."""
        return list(self._work())

    def next_stream(self) -> tuple[Sequence, ChunkWork] | None:
        """A chunk whose source is still arriving, the oldest first."""
        for sequence in self.running:
            if not sequence.prefilling or sequence.streaming or not any(s.arriving for s in sequence.spans):
                continue
            chunk = sequence.stream(self.max_batch_tokens)
            if chunk is None:
                continue
            if sequence.active_rows(chunk) >= WORTHWHILE_ROWS or not sequence.stops_short(chunk):
                return sequence, chunk
        return None

    def can_run(self) -> bool:
        """True if ``schedule`` would return work."""
        return next(self._work(), None) is not None

    def _work(self) -> Iterator[tuple[Sequence, ChunkWork]]:
        budget = self.max_batch_tokens
        for sequence in self.running:
            if not sequence.prefilling and (chunk := sequence.chunk(1)) is not None:
                budget -= 1
                yield sequence, chunk
        for sequence in self.running:
            if sequence.prefilling and (chunk := sequence.chunk(budget)) is not None:
                rows = sequence.active_rows(chunk)
                if not self.hold_back or rows >= WORTHWHILE_ROWS or not sequence.stops_short(chunk):
                    budget -= rows
                    yield sequence, chunk
