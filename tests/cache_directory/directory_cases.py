"""Short ways to spell what directory tests talk about."""

from __future__ import annotations

from vlcache_dist import wire
from vlcache_dist.types import ContentKey, ObjectKind, Role, Variant

KV, EMBEDDING = ObjectKind.KV, ObjectKind.EMBEDDING
META = wire.MediaMeta("image", (1, 4, 6))


def key(number: int) -> ContentKey:
    return number.to_bytes(32, "big")


def variant(number: int) -> Variant:
    return number.to_bytes(16, "big")


def info(name: str, incarnation: int = 1, address: str = "", role: Role = Role.PREFILL) -> wire.WorkerInfo:
    """A worker; a later incarnation has the higher number."""
    address = address or f"tcp://{name}:{incarnation}"
    return wire.WorkerInfo(f"{name}#{incarnation}", name, role, address, started=float(incarnation))


def entry(number: int, kind: ObjectKind = KV, of: int = 0, nbytes: int = 100) -> wire.Entry:
    return wire.Entry(key(number), kind, variant(of), nbytes, META)
