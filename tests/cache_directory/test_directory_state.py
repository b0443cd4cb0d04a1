"""The shard's state machine, one rule at a time."""

from __future__ import annotations

import pytest
from directory_cases import EMBEDDING, KV, META, entry, info, key, variant

from vlcache_dist import wire
from vlcache_dist.cache_directory.state import DirectoryState
from vlcache_dist.types import ObjectKind, Role

A, B = "a#1", "b#1"


@pytest.fixture
def state() -> DirectoryState:
    """Two members, a and b, that were heard at 0 s and expire after 3 s."""
    state = DirectoryState("epoch", expiry_s=3.0)
    state.register(info("a"), 0.0)
    state.register(info("b"), 0.0)
    return state


def announce(state: DirectoryState, worker: str, *entries: wire.Entry, now: float = 0.0) -> list[object]:
    return list(state.announce(wire.Announce(worker, entries), now))


def claim(state: DirectoryState, worker: str, number: int, *, ttl_s: float = 10.0, now: float = 0.0) -> wire.ClaimReply:
    return state.claim(wire.Claim(worker, key(number), KV, ttl_s), now)


def holders(state: DirectoryState, number: int, kind: ObjectKind = KV) -> list[str]:
    return [holder.worker_id for holder in state.holders((kind, key(number)))]


def test_what_is_announced_is_found(state: DirectoryState) -> None:
    announce(state, A, entry(1, of=7, nbytes=50), entry(1, EMBEDDING))
    announce(state, B, entry(1, of=8))
    found = state.lookup(key(1))
    assert found.meta == META
    assert found.kv == (
        wire.Holder(A, "tcp://a:1", variant(7), 50),
        wire.Holder(B, "tcp://b:1", variant(8), 100),
    ), "who computed it comes first"
    assert [holder.worker_id for holder in found.embedding] == [A]
    assert state.lookup(key(2)) == wire.KeyState(key(2), None)


def test_what_is_retracted_is_not_found_and_its_shape_is_still_known(state: DirectoryState) -> None:
    announce(state, A, entry(1))
    announce(state, B, entry(1))
    state.retract(A, (KV, key(1)), variant(0), 1.0)
    assert holders(state, 1) == [B]
    state.retract(B, (KV, key(1)), variant(9), 1.0)
    assert holders(state, 1) == [B], "another variant"
    state.retract(B, (KV, key(1)), variant(0), 1.0)
    state.retract(B, (KV, key(1)), variant(0), 1.0)
    assert state.lookup(key(1)) == wire.KeyState(key(1), META)
    state.validate()


def test_what_nobody_holds_is_remembered_in_part(state: DirectoryState) -> None:
    state = DirectoryState("epoch", expiry_s=3.0, max_metas=2)
    state.register(info("a"), 0.0)
    for number in (1, 2, 3):
        announce(state, A, entry(number))
    for number in (1, 2):
        state.retract(A, (KV, key(number)), variant(0), 0.0)
    assert state.lookup(key(1)).meta == META, "and thereby used"
    state.retract(A, (KV, key(3)), variant(0), 0.0)
    assert [number for number in (1, 2, 3) if state.lookup(key(number)).meta] == [1, 3]
    state.validate()


def test_of_a_members_objects_the_latest_are_remembered() -> None:
    state = DirectoryState("epoch", expiry_s=3.0, max_objects=3)
    state.register(info("a"), 0.0)
    announce(state, A, *(entry(number) for number in (1, 2, 3)))
    announce(state, A, entry(1), entry(4))
    assert [number for number in range(1, 5) if holders(state, number)] == [1, 3, 4]
    state.validate()


def test_a_silent_member_goes_with_all_it_had(state: DirectoryState) -> None:
    announce(state, A, entry(1))
    announce(state, B, entry(1))
    claim(state, A, 2, ttl_s=100)
    assert state.heartbeat(B, wire.WorkerLoad(running=2), False, 3.0)
    assert state.expire(3.0) == []
    assert state.expire(3.1) == [(KV, key(2))], "those who wait for its claim are woken"
    assert holders(state, 1) == [B]
    assert [member.info.name for member in state.members(None, 3.1)] == ["b"]
    assert not state.heartbeat(A, wire.WorkerLoad(), False, 3.2), "it must register again"
    assert announce(state, A, entry(3), now=3.2) == []
    assert holders(state, 3) == []
    state.validate()


def test_a_later_incarnation_takes_the_place_of_an_earlier_one(state: DirectoryState) -> None:
    announce(state, A, entry(1))
    claim(state, A, 2)
    assert state.register(info("a", 2), 1.0) == [(KV, key(2))]
    assert holders(state, 1) == []
    assert [member.info.worker_id for member in state.members(None, 1.0)] == ["a#2", B]
    state.validate()


def test_an_earlier_incarnation_does_not_drive_out_a_later_one(state: DirectoryState) -> None:
    """A rolling update: the old worker drains, heartbeats, is told to register, and must not."""
    state.register(info("a", 2), 1.0)
    announce(state, "a#2", entry(1))
    for now in (1.1, 1.6, 2.1):
        assert not state.heartbeat(A, wire.WorkerLoad(), True, now)
        assert state.register(info("a", 1), now) is None
        announce(state, A, entry(2))
    assert holders(state, 1) == ["a#2"]
    assert holders(state, 2) == []
    state.remove("a#2", 3.0, "left")
    assert state.register(info("a", 1), 3.1) == [], "the later one is gone"


def test_registering_again_keeps_what_is_known(state: DirectoryState) -> None:
    announce(state, A, entry(1))
    claim(state, A, 2)
    state.heartbeat(A, wire.WorkerLoad(running=5), False, 1.0)
    assert state.register(info("a", 1, address="tcp://elsewhere:1"), 2.0) == []
    (holder,) = state.holders((KV, key(1)))
    assert holder.address == "tcp://elsewhere:1"
    assert state.lookup(key(2)).producer == A
    assert state.members(Role.PREFILL, 2.5)[0].load.running == 5


def test_members_by_role_with_age_and_draining(state: DirectoryState) -> None:
    state.register(info("e", role=Role.ENCODER), 1.0)
    state.heartbeat("e#1", wire.WorkerLoad(waiting=3), True, 2.0)
    (member,) = state.members(Role.ENCODER, 2.5)
    assert (member.info.draining, member.load.waiting, member.age_s) == (True, 3, 0.5)
    assert len(state.members(None, 2.5)) == 3


def test_one_producer_at_a_time(state: DirectoryState) -> None:
    assert claim(state, A, 1).granted
    assert claim(state, B, 1) == wire.ClaimReply(False, (), A)
    assert state.lookup(key(1)).producer == A
    assert claim(state, A, 1).granted, "its own"
    assert state.claim(wire.Claim(B, key(1), EMBEDDING, 1.0), 0.0).granted, "another kind"
    assert claim(state, B, 2).granted, "another key"


def test_who_holds_an_object_ends_the_need_to_claim_it(state: DirectoryState) -> None:
    claim(state, A, 1)
    assert not state.settled((KV, key(1)))
    assert announce(state, A, entry(1)) == [(KV, key(1))]
    assert state.settled((KV, key(1)))
    reply = claim(state, B, 1)
    assert not reply.granted
    assert [holder.worker_id for holder in reply.holders] == [A]


def test_another_workers_announcement_does_not_end_a_claim_but_wakes(state: DirectoryState) -> None:
    claim(state, A, 1)
    assert announce(state, B, entry(1)) == [(KV, key(1))]
    state.retract(B, (KV, key(1)), variant(0), 0.5)
    assert claim(state, B, 1) == wire.ClaimReply(False, (), A)


def test_a_claim_ends_when_its_producer_gives_up(state: DirectoryState) -> None:
    claim(state, A, 1)
    assert state.unclaim(B, (KV, key(1)), 0.0) == [], "not its claim"
    assert state.unclaim(A, (KV, key(1)), 0.0) == [(KV, key(1))]
    assert state.unclaim(A, (KV, key(1)), 0.0) == []
    assert claim(state, B, 1).granted


@pytest.mark.parametrize("ttl_s", [1.0, float("nan")])
def test_a_claim_runs_out(state: DirectoryState, ttl_s: float) -> None:
    claim(state, A, 1, ttl_s=ttl_s)
    assert claim(state, B, 1, now=1.0).granted, "overdue, although no timer has seen it yet"
    claim(state, A, 2, ttl_s=ttl_s)
    assert (KV, key(2)) in state.expire(1.0)
    assert state.settled((KV, key(2)))


def test_a_stranger_produces_without_a_claim(state: DirectoryState) -> None:
    """Nobody would end it if the stranger died."""
    assert claim(state, "stranger#1", 1).granted
    assert claim(state, A, 1).granted
    state.validate()


def test_one_keys_story_can_be_told(state: DirectoryState) -> None:
    claim(state, A, 1, now=1.0)
    announce(state, A, entry(1), now=2.0)
    announce(state, B, entry(2), now=2.0)
    state.retract(A, (KV, key(1)), variant(0), 3.0)
    story = state.story(key(1))
    assert [line.split()[0] for line in story] == ["1.000", "2.000", "3.000"]
    assert all(A in line for line in story)
