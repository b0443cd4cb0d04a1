"""The guard's books of all workers, kept by the directory's first shard. Pure.

Soft state like everything here: after a restart the workers bring their copies along with their first word to the new
epoch (``reuse.books`` says what becomes of copies that differ).
"""

from __future__ import annotations

from collections import OrderedDict

from vlcache_dist.reuse.books import Books
from vlcache_dist.reuse.ladder import Level
from vlcache_dist.wire import ShareBooks, SharedBooks

MAX_MODELS = 16  #: an upgrade has two


class GuardBooks:
    """``epoch``: the shard's. Books are kept per ``scope``, the fingerprint of a model."""

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        self._models: OrderedDict[str, Books] = OrderedDict()

    def share(self, message: ShareBooks) -> SharedBooks:
        """Count what a worker has seen, and say what it does not know. A worker of another epoch is told this one, and
        nothing that it says is counted before it has brought its copies."""
        books = self._models.setdefault(message.scope, Books())
        self._models.move_to_end(message.scope)
        if len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        if message.epoch == self._epoch:
            for standing in message.copies:
                books.take_up(standing)
            for seen in message.news:
                books.observe(message.worker_id, seen)
        unknown = tuple(s for s in books.standings() if message.known.get(s.format) != s.rank)
        return SharedBooks(self._epoch, unknown)

    def stats(self) -> dict[str, dict[str, str]]:
        """Level per model and format; for people."""
        return {
            scope: {s.format: Level(s.level).name.lower() for s in books.standings()}
            for scope, books in self._models.items()
        }
