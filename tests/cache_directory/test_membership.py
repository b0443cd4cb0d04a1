"""The list of members, put together from shards that know more or less."""

from __future__ import annotations

from directory_cases import info

from vlcache_dist import wire
from vlcache_dist.cache_directory.membership import MemberList


def says(epoch: str, *members: tuple[str, float]) -> wire.Members:
    return wire.Members(epoch, tuple(wire.Member(info(name), wire.WorkerLoad(), age) for name, age in members))


def names(members: MemberList) -> list[str]:
    return [member.info.name for member in members.members]


def test_what_is_there_at_first_counts() -> None:
    members = MemberList()
    members.update([says("x", ("b", 0.1), ("a", 0.1))], 0.0)
    assert names(members) == ["a", "b"]
    members.update([says("x", ("a", 0.1))], 0.5)
    assert names(members) == ["a"]


def test_the_latest_word_about_a_member_counts() -> None:
    members = MemberList()
    members.update([says("x", ("a", 2.0)), says("y", ("a", 0.5))], 0.0)
    assert [member.age_s for member in members.members] == [0.5]


def test_no_answer_changes_nothing() -> None:
    members = MemberList()
    members.update([says("x", ("a", 0.1))], 0.0)
    members.update([], 100.0)
    assert names(members) == ["a"]


def test_a_restarted_shard_does_not_empty_the_list() -> None:
    members = MemberList(grace_s=3.0)
    members.update([says("x", ("a", 0.1), ("b", 0.1))], 0.0)
    members.update([says("new")], 1.0)
    members.update([says("new", ("a", 0.1))], 2.0)
    assert names(members) == ["a", "b"]
    members.update([says("new", ("a", 0.1))], 4.1)
    assert names(members) == ["a"], "b had its time to come back"


def test_beside_a_settled_shard_a_restarted_one_says_nothing() -> None:
    members = MemberList()
    members.update([says("x", ("a", 0.1), ("b", 0.1)), says("y", ("a", 0.1), ("b", 0.1))], 0.0)
    members.update([says("x", ("a", 0.1), ("b", 0.1)), says("new")], 1.0)
    assert names(members) == ["a", "b"]
    members.update([says("x", ("b", 0.1)), says("new")], 1.5)
    assert names(members) == ["b"], "the settled one says that a has left"
