"""What one shard of the cache directory knows, as a state machine. Pure: time is an argument, nothing is sent.

The directory is a hint, the holder is the authority: a stale entry costs its reader a round trip, never wrong bytes.
All of it is soft state. A shard that restarts is empty and has a new epoch, and members announce again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import msgspec

from vlcache_dist.cache_directory.fingerprint import fingerprint
from vlcache_dist.types import ContentKey, ObjectKind, Role, Variant, WorkerId
from vlcache_dist.wire import (
    Announce,
    Claim,
    ClaimReply,
    Entry,
    Holder,
    KeyState,
    MediaMeta,
    Member,
    WorkerInfo,
    WorkerLoad,
)

Name = tuple[ObjectKind, ContentKey]


@dataclass(slots=True)
class _Member:
    info: WorkerInfo
    load: WorkerLoad
    heard: float
    objects: dict[tuple[Name, Variant], None] = field(default_factory=dict)  # in the order of announcements
    held: int = 0  # their fingerprint


@dataclass(slots=True)
class _Claim:
    worker_id: WorkerId
    until: float


class DirectoryState:
    """One shard. Methods that end a wait (an announcement, a claim's end) return the names whose waiters are to be
    woken. ``expiry_s``: a member that is silent for so long is gone. ``max_metas`` bounds what is remembered of media
    that nobody holds, ``max_objects`` what is remembered of one member's objects (its latest announcements)."""

    def __init__(
        self,
        epoch: str,
        *,
        expiry_s: float,
        max_metas: int = 1_000_000,
        max_objects: int = 1_000_000,
        log_size: int = 10_000,
    ) -> None:
        self.epoch = epoch
        self.expiry_s = expiry_s
        self._max_metas = max_metas
        self._max_objects = max_objects
        self._members: dict[WorkerId, _Member] = {}
        self._holders: dict[Name, dict[tuple[WorkerId, Variant], int]] = {}  # -> nbytes
        self._claims: dict[Name, _Claim] = {}
        self._metas: dict[ContentKey, MediaMeta] = {}  # of keys that somebody holds
        self._idle_metas: OrderedDict[ContentKey, MediaMeta] = OrderedDict()  # least recently asked for first
        self._log: deque[tuple[float, str, str]] = deque(maxlen=log_size)

    # -- members ------------------------------------------------------------------------------------------------

    def register(self, info: WorkerInfo, now: float) -> list[Name] | None:
        """A member joins. An older incarnation of the same name is gone from this moment; None: ``info`` is that of
        the older one (it may be draining still, and must not drive its successor out)."""
        same = [m.info for m in self._members.values() if m.info.name == info.name]
        others = [other for other in same if other.worker_id != info.worker_id]
        if any(other.started > info.started for other in others):
            return None
        woken: list[Name] = []
        for other in others:
            woken += self.remove(other.worker_id, now, f"replaced by {info.worker_id}")
        known = self._members.get(info.worker_id)
        if known is None:
            self._members[info.worker_id] = _Member(info, WorkerLoad(), now)
        else:
            known.info, known.heard = info, now
        self._note(now, "", f"register {info.worker_id} {info.address}")
        return woken

    def heartbeat(self, worker_id: WorkerId, load: WorkerLoad, draining: bool, now: float) -> bool:
        """False: this shard does not know the worker; it must register and announce again."""
        member = self._members.get(worker_id)
        if member is None:
            return False
        member.heard, member.load = now, load
        if draining != member.info.draining:
            member.info = msgspec.structs.replace(member.info, draining=draining)
        return True

    def held(self, worker_id: WorkerId) -> int:
        """Fingerprint of what a member is believed to hold; 0 for nobody and nothing."""
        member = self._members.get(worker_id)
        return 0 if member is None else member.held

    def remove(self, worker_id: WorkerId, now: float, why: str) -> list[Name]:
        """A member left or died: its entries and claims go with it."""
        member = self._members.pop(worker_id, None)
        if member is None:
            return []
        for name, variant in member.objects:
            self._drop_holder(name, worker_id, variant)
        ended = [name for name, claim in self._claims.items() if claim.worker_id == worker_id]
        for name in ended:
            del self._claims[name]
        self._note(now, "", f"remove {worker_id}: {why}")
        return ended

    def expire(self, now: float) -> list[Name]:
        """Silent members and overdue claims end."""
        woken: list[Name] = []
        for worker_id in [w for w, m in self._members.items() if now - m.heard > self.expiry_s]:
            woken += self.remove(worker_id, now, f"silent for more than {self.expiry_s} s")
        for name in [n for n, claim in self._claims.items() if not claim.until > now]:
            self._note(now, name[1].hex(), f"claim of {self._claims[name].worker_id} on {name[0]} ran out")
            del self._claims[name]
            woken.append(name)
        return woken

    def members(self, role: Role | None, now: float) -> tuple[Member, ...]:
        """By name."""
        found = [
            Member(m.info, m.load, now - m.heard) for m in self._members.values() if role is None or m.info.role is role
        ]
        return tuple(sorted(found, key=lambda m: m.info.name))

    # -- objects ------------------------------------------------------------------------------------------------

    def announce(self, message: Announce, now: float) -> list[Name]:
        """Committed objects; ignored from a worker this shard does not know (its next heartbeat tells it so)."""
        member = self._members.get(message.worker_id)
        if member is None:
            return []
        woken: list[Name] = []
        for entry in message.entries:
            name = (entry.kind, entry.key)
            self._holders.setdefault(name, {})[message.worker_id, entry.variant] = entry.nbytes
            if (name, entry.variant) in member.objects:
                del member.objects[name, entry.variant]
            else:
                member.held ^= fingerprint(*name, entry.variant)
            member.objects[name, entry.variant] = None
            self._remember(entry)
            claim = self._claims.get(name)
            if claim is not None and claim.worker_id == message.worker_id:
                del self._claims[name]
            woken.append(name)
            self._note(now, entry.key.hex(), f"{message.worker_id} holds {entry.kind} {entry.variant.hex()[:8]}")
        while len(member.objects) > self._max_objects:
            self.retract(message.worker_id, *next(iter(member.objects)), now)
        return woken

    def retract(self, worker_id: WorkerId, name: Name, variant: Variant, now: float) -> None:
        """The object is no longer there: said by the holder, or by a reader that was told so."""
        member = self._members.get(worker_id)
        if member is not None and (name, variant) in member.objects:
            del member.objects[name, variant]
            member.held ^= fingerprint(*name, variant)
        self._drop_holder(name, worker_id, variant)
        self._note(now, name[1].hex(), f"{worker_id} no longer holds {name[0]} {variant.hex()[:8]}")

    def lookup(self, key: ContentKey) -> KeyState:
        claim = self._claims.get((ObjectKind.KV, key))
        meta = self._metas.get(key) or self._idle_metas.get(key)
        if key in self._idle_metas:
            self._idle_metas.move_to_end(key)
        return KeyState(
            key=key,
            meta=meta,
            kv=self.holders((ObjectKind.KV, key)),
            embedding=self.holders((ObjectKind.EMBEDDING, key)),
            producer=claim.worker_id if claim else None,
        )

    def holders(self, name: Name) -> tuple[Holder, ...]:
        """In the order of their announcements: who computed the object comes first."""
        found = self._holders.get(name, {})
        return tuple(
            Holder(worker_id, self._members[worker_id].info.address, variant, nbytes)
            for (worker_id, variant), nbytes in found.items()
        )

    # -- single flight ------------------------------------------------------------------------------------------

    def claim(self, message: Claim, now: float) -> ClaimReply:
        """Grant the production of an object to one worker at a time; granting to the holder of the claim renews it."""
        name = (message.kind, message.key)
        if holders := self.holders(name):
            return ClaimReply(False, holders)
        claim = self._claims.get(name)
        if claim is not None and claim.until > now and claim.worker_id != message.worker_id:
            return ClaimReply(False, (), claim.worker_id)
        if message.worker_id not in self._members:
            return ClaimReply(True)  # granted, but not remembered: nobody would end it if the worker died
        self._claims[name] = _Claim(message.worker_id, now + message.ttl_s)
        self._note(now, message.key.hex(), f"{message.worker_id} produces {message.kind}")
        return ClaimReply(True)

    def unclaim(self, worker_id: WorkerId, name: Name, now: float) -> list[Name]:
        claim = self._claims.get(name)
        if claim is None or claim.worker_id != worker_id:
            return []
        del self._claims[name]
        self._note(now, name[1].hex(), f"{worker_id} gave up producing {name[0]}")
        return [name]

    def settled(self, name: Name) -> bool:
        """True if there is nothing to wait for: somebody holds the object, or nobody produces it."""
        return bool(self._holders.get(name)) or name not in self._claims

    # -- reports ------------------------------------------------------------------------------------------------

    def story(self, key: ContentKey) -> list[str]:
        """What the log still knows of one key, oldest first."""
        return [f"{at:.3f} {what}" for at, about, what in self._log if about == key.hex()]

    def stats(self) -> dict[str, object]:
        return {
            "epoch": self.epoch,
            "members": len(self._members),
            "objects": sum(map(len, self._holders.values())),
            "claims": len(self._claims),
            "metas": len(self._metas) + len(self._idle_metas),
        }

    def validate(self) -> None:
        """Raise AssertionError unless all indices agree."""
        listed = {(n, w, v) for n, holders in self._holders.items() for w, v in holders}
        owned = {(n, w, v) for w, member in self._members.items() for n, v in member.objects}
        assert listed == owned, listed ^ owned
        for member in self._members.values():
            expected = 0
            for (kind, key), variant in member.objects:
                expected ^= fingerprint(kind, key, variant)
            assert member.held == expected, "a fingerprint does not fit"
        assert all(self._holders.values()), "a name without holders is kept"
        assert all(claim.worker_id in self._members for claim in self._claims.values())
        assert len({m.info.name for m in self._members.values()}) == len(self._members)
        assert all(len(m.objects) <= self._max_objects for m in self._members.values())
        assert {key for _, key in self._holders} == set(self._metas)
        assert not set(self._metas) & set(self._idle_metas) and len(self._idle_metas) <= self._max_metas

    # -- inside -------------------------------------------------------------------------------------------------

    def _remember(self, entry: Entry) -> None:
        self._idle_metas.pop(entry.key, None)
        self._metas[entry.key] = entry.meta

    def _drop_holder(self, name: Name, worker_id: WorkerId, variant: Variant) -> None:
        holders = self._holders.get(name)
        if holders is not None:
            holders.pop((worker_id, variant), None)
            if not holders:
                del self._holders[name]
                self._retire_meta(name[1])

    def _retire_meta(self, key: ContentKey) -> None:
        """What a picture's prompt needs outlives its objects, for as long as there is room."""
        if key not in self._metas or any((kind, key) in self._holders for kind in ObjectKind):
            return
        self._idle_metas[key] = self._metas.pop(key)
        if len(self._idle_metas) > self._max_metas:
            self._idle_metas.popitem(last=False)

    def _note(self, now: float, about: str, what: str) -> None:
        self._log.append((now, about, what))
