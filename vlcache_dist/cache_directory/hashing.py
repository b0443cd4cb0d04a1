"""Rendezvous hashing: who is responsible for a key, with as few moves as possible when somebody comes or goes."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from vlcache_dist.types import ContentKey


def ranked(key: ContentKey, candidates: Sequence[str]) -> list[str]:
    """All candidates, the responsible one first; when it is gone, the next takes over its keys and no others move."""
    return sorted(candidates, key=lambda candidate: blake3(key + candidate.encode()).digest())
