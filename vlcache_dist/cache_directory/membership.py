"""Who is there, put together from what the directory's shards say. Pure: time is an argument.

Every worker is registered at every shard, but a shard that was restarted knows nobody until the next heartbeats: that
it does not list a worker means nothing yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlcache_dist.wire import Member, Members

GRACE_S = 3.0  #: how long a shard is known before its silence about a worker counts


class MemberList:
    """The latest list of members, by name."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.members: tuple[Member, ...] = ()
        self._grace_s = grace_s
        self._since: dict[str, float] = {}  # epoch -> when it was first heard of

    def update(self, replies: Sequence[Members], now: float) -> None:
        """What the shards that answered say now; with no answer at all, nothing changes."""
        if not replies:
            return
        start = now if self._since else now - self._grace_s  # whatever is there when this process comes is settled
        self._since = {reply.epoch: self._since.get(reply.epoch, start) for reply in replies}
        settled = [reply for reply in replies if now - self._since[reply.epoch] >= self._grace_s]
        by_name: dict[str, Member] = {}
        for reply in settled or replies:
            for member in reply.members:
                known = by_name.get(member.info.name)
                if known is None or member.age_s < known.age_s:
                    by_name[member.info.name] = member
        if not settled:
            for member in self.members:
                by_name.setdefault(member.info.name, member)
        self.members = tuple(by_name[name] for name in sorted(by_name))
