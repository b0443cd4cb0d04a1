"""A set of objects in 64 bits, so that a worker and the directory can see whether they speak of the same one."""

from __future__ import annotations

from functools import lru_cache

from blake3 import blake3

from vlcache_dist.types import ContentKey, ObjectKind, Variant


@lru_cache(maxsize=1 << 16)
def fingerprint(kind: ObjectKind, key: ContentKey, variant: Variant) -> int:
    """Of one object; of a set, the exclusive or of its objects'."""
    return int.from_bytes(blake3(kind.encode() + key + variant).digest(8), "little")
