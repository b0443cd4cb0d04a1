"""Which pictures go into the next forward pass of the vision tower. Pure."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from vlcache_dist.types import ContentKey


class EncodeJob(msgspec.Struct, frozen=True):
    """One picture or video to encode: ``patches`` before merging, ``tokens`` after."""

    key: ContentKey
    patches: int
    tokens: int


class EncodeScheduler:
    """First come, first served, packed up to ``max_patches`` per pass; a job is queued at most once per key.

    A job larger than ``max_patches`` runs alone: the limit bounds a batch's activation memory, it does not refuse
    pictures (``MediaSettings`` does).
    """

    def __init__(self, max_patches: int) -> None:
        if max_patches < 1:
            raise ValueError(f"max_patches must be positive, not {max_patches}")
        self.max_patches = max_patches
        self._waiting: OrderedDict[ContentKey, EncodeJob] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        return sum(job.tokens for job in self._waiting.values())

    def add(self, job: EncodeJob) -> bool:
        """Queue a job; False if its key already waits."""
        if job.key in self._waiting:
            return False
        self._waiting[job.key] = job
        return True

    def cancel(self, key: ContentKey) -> bool:
        """Forget a waiting job; False if it does not wait (any more)."""
        return self._waiting.pop(key, None) is not None

    def next_batch(self) -> list[EncodeJob]:
        """Take the next jobs off the queue, in order; empty if nothing waits."""
        batch: list[EncodeJob] = []
        patches = 0
        while self._waiting:
            job = next(iter(self._waiting.values()))
            if batch and patches + job.patches > self.max_patches:
                break
            patches += job.patches
            batch.append(self._waiting.popitem(last=False)[1])
        return batch
