"""Whatever happens in whatever order, the shard agrees with a simple model of it."""

from __future__ import annotations

from directory_cases import EMBEDDING, KV, META, info, key, variant
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vlcache_dist import wire
from vlcache_dist.cache_directory.state import DirectoryState, Name

EXPIRY_S = 3.0
workers = st.tuples(st.sampled_from("ab"), st.sampled_from([1, 1, 1, 2]))  # name, incarnation
names = st.sampled_from([(KV, key(0)), (EMBEDDING, key(0)), (KV, key(1))])
variants = st.integers(0, 1).map(variant)


def worker_id(worker: tuple[str, int]) -> str:
    return f"{worker[0]}#{worker[1]}"


class DirectoryMachine(RuleBasedStateMachine):
    """``waiting``: names somebody waits for, as the server's long polls do; who is refused a claim does."""

    def __init__(self) -> None:
        super().__init__()
        self.state = DirectoryState("epoch", expiry_s=EXPIRY_S, max_metas=2, max_objects=4)
        self.now = 0.0
        self.heard: dict[str, float] = {}
        self.objects: dict[str, list[tuple[Name, bytes]]] = {}  # by worker, in the order of announcements
        self.claims: dict[Name, tuple[str, float]] = {}
        self.waiting: set[Name] = set()
        for name in "ab":
            self.register((name, 1))

    def woken(self, names: list[Name]) -> None:
        self.waiting -= set(names)

    def forget(self, worker: str) -> None:
        self.heard.pop(worker, None)
        self.objects.pop(worker, None)
        self.claims = {name: claim for name, claim in self.claims.items() if claim[0] != worker}

    def holding(self, name: Name) -> set[tuple[str, bytes]]:
        return {(w, v) for w, objects in self.objects.items() for n, v in objects if n == name}

    @rule(worker=workers)
    def register(self, worker: tuple[str, int]) -> None:
        name, incarnation = worker
        woken = self.state.register(info(name, incarnation), self.now)
        if incarnation == 1 and f"{name}#2" in self.heard:
            assert woken is None
            return
        assert woken is not None
        self.forget(f"{name}#{3 - incarnation}")
        self.heard[worker_id(worker)] = self.now
        self.objects.setdefault(worker_id(worker), [])
        self.woken(woken)

    @rule(worker=workers, draining=st.booleans())
    def heartbeat(self, worker: tuple[str, int], draining: bool) -> None:
        own = worker_id(worker)
        assert self.state.heartbeat(own, wire.WorkerLoad(), draining, self.now) == (own in self.heard)
        if own in self.heard:
            self.heard[own] = self.now

    @rule(worker=workers)
    def leave(self, worker: tuple[str, int]) -> None:
        self.woken(self.state.remove(worker_id(worker), self.now, "left"))
        self.forget(worker_id(worker))

    @rule(worker=workers, entries=st.lists(st.tuples(names, variants), max_size=3))
    def announce(self, worker: tuple[str, int], entries: list[tuple[Name, bytes]]) -> None:
        own = worker_id(worker)
        message = wire.Announce(own, tuple(wire.Entry(k, kind, v, 1, META) for (kind, k), v in entries))
        self.woken(self.state.announce(message, self.now))
        if own not in self.heard:
            return
        for name, v in entries:
            self.objects[own] = [o for o in self.objects[own] if o != (name, v)] + [(name, v)]
            if self.claims.get(name, ("", 0.0))[0] == own:
                del self.claims[name]
        self.objects[own] = self.objects[own][-4:]

    @rule(worker=workers, name=names, v=variants)
    def retract(self, worker: tuple[str, int], name: Name, v: bytes) -> None:
        self.state.retract(worker_id(worker), name, v, self.now)
        if worker_id(worker) in self.objects:
            self.objects[worker_id(worker)] = [o for o in self.objects[worker_id(worker)] if o != (name, v)]

    @rule(name=names, first=workers, second=workers, ttl_s=st.sampled_from([0.5, 2.0, 10.0]))
    def compete(self, name: Name, first: tuple[str, int], second: tuple[str, int], ttl_s: float) -> None:
        for worker in (first, second):
            self.claim(worker, name, ttl_s)

    def claim(self, worker: tuple[str, int], name: Name, ttl_s: float) -> None:
        own = worker_id(worker)
        reply = self.state.claim(wire.Claim(own, name[1], name[0], ttl_s), self.now)
        assert {(h.worker_id, h.variant) for h in reply.holders} == self.holding(name)
        producer, until = self.claims.get(name, (own, 0.0))
        taken = producer != own and until > self.now
        assert reply.granted == (not reply.holders and not taken)
        if reply.granted and own in self.heard:
            self.claims[name] = own, self.now + ttl_s
        elif not reply.granted and not reply.holders:
            assert reply.producer == producer
            self.waiting.add(name)

    @rule(worker=workers, name=names)
    def unclaim(self, worker: tuple[str, int], name: Name) -> None:
        self.woken(self.state.unclaim(worker_id(worker), name, self.now))
        if self.claims.get(name, ("", 0.0))[0] == worker_id(worker):
            del self.claims[name]

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.0]), seen=st.booleans())
    def time_passes(self, seconds: float, seen: bool) -> None:
        self.now += seconds
        if not seen:
            return  # the timer is late
        self.woken(self.state.expire(self.now))
        for worker in [w for w, heard in self.heard.items() if self.now - heard > EXPIRY_S]:
            self.forget(worker)
        self.claims = {name: claim for name, claim in self.claims.items() if claim[1] > self.now}

    @invariant()
    def indices_agree(self) -> None:
        self.state.validate()

    @invariant()
    def members_are_those_of_the_model(self) -> None:
        found = {member.info.worker_id for member in self.state.members(None, self.now)}
        assert found == set(self.heard)

    @invariant()
    def holders_and_producers_are_those_of_the_model(self) -> None:
        for number in range(2):
            found = self.state.lookup(key(number))
            for kind, holders in ((KV, found.kv), (EMBEDDING, found.embedding)):
                assert {(h.worker_id, h.variant) for h in holders} == self.holding((kind, key(number))), (
                    self.state.story(key(number))
                )
            assert found.producer == self.claims.get((KV, key(number)), (None, 0.0))[0]

    @invariant()
    def nobody_waits_for_what_is_settled(self) -> None:
        for name in self.waiting:
            assert not self.state.settled(name), self.state.story(name[1])


DirectoryMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestDirectoryState = DirectoryMachine.TestCase
