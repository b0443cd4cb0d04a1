"""The ingress's view of the pools: who is there, how busy, and who takes the next request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vlcache_dist import wire
from vlcache_dist.errors import WorkerLost
from vlcache_dist.serve.placement import Candidate, Choice, Costs, Demand, Policy, Turns, choose, least_ttft
from vlcache_dist.types import Role, WorkerId


@dataclass(frozen=True, slots=True)
class _Foreign:
    """What other ingresses have sent to a worker: its heartbeat less what this one had under way when it came."""

    load: wire.WorkerLoad
    queued: int
    tokens: int


class Dispatcher:
    """One event loop's. ``members`` returns the directory's latest list. Requests in flight are counted here, because
    heartbeats are older than the last requests."""

    def __init__(self, members: Callable[[], Sequence[wire.Member]], costs: Costs, policy: Policy = least_ttft) -> None:
        self._members = members
        self._costs = costs
        self._policy = policy
        self._sent: dict[WorkerId, int] = {}  # active tokens of unanswered prefills
        self._requests: dict[WorkerId, int] = {}  # and how many these are
        self._foreign: dict[WorkerId, _Foreign] = {}
        self._streams: dict[WorkerId, int] = {}  # sequences decoding
        self._turns = Turns()

    def workers(self, *roles: Role) -> list[wire.Member]:
        """Living members of these roles, by name."""
        found = [m for m in self._members() if m.info.role in roles and not m.info.draining]
        return sorted(found, key=lambda m: m.info.name)

    def member(self, worker_id: WorkerId) -> wire.Member:
        """Raises WorkerLost if it is gone."""
        for member in self._members():
            if member.info.worker_id == worker_id:
                return member
        raise WorkerLost(f"{worker_id} is gone")

    def choose_prefill(
        self, demand: Demand, pin: str | None, exclude: Iterable[WorkerId]
    ) -> tuple[wire.Member, Choice]:
        """``exclude``: who has failed this request; they get another chance if nobody else is there. Raises WorkerLost
        if nobody is, BadRequest for an unknown ``pin``."""
        members = self.workers(Role.PREFILL, Role.COLOCATED)
        exclude = self._avoidable([m for m in members if pin in (None, m.info.name, m.info.worker_id)], exclude)
        candidates = self._candidates(members)
        choice = choose(
            candidates, demand, self._costs, turns=self._turns, policy=self._policy, pin=pin, exclude=exclude
        )
        self._turns.taken(choice.worker_id)
        return self.member(choice.worker_id), choice

    def _candidates(self, members: Sequence[wire.Member]) -> list[Candidate]:
        """What this ingress has sent is known to the moment; what others have sent, as of the last heartbeat."""
        found, foreign = [], {}
        for member in members:
            worker_id, load = member.info.worker_id, member.load
            queued, tokens = self._requests.get(worker_id, 0), self._sent.get(worker_id, 0)
            known = self._foreign.get(worker_id)
            if known is None or known.load is not load:
                waiting = load.waiting + load.running
                known = _Foreign(load, max(0, waiting - queued), max(0, load.waiting_tokens - tokens))
            foreign[worker_id] = known
            found.append(
                Candidate(
                    worker_id,
                    member.info.name,
                    queued + (known.queued if known.tokens else 0),
                    tokens + known.tokens,
                    load.pass_s,
                    load.token_s,
                    load.read_bytes_per_s,
                    load.read_latency_s,
                    member.info.draining,
                )
            )
        self._foreign = foreign
        return found

    def choose_decode(self, exclude: Iterable[WorkerId]) -> wire.Member:
        """The decode worker with the fewest sequences; ``exclude`` as above. Raises WorkerLost if there is none."""
        members = self.workers(Role.DECODE, Role.COLOCATED)
        excluded = self._avoidable(members, exclude)
        members = [m for m in members if m.info.worker_id not in excluded]
        if not members:
            raise WorkerLost("no decode worker is available")
        return min(members, key=lambda m: (self._streams.get(m.info.worker_id, 0), m.load.running, m.info.name))

    @staticmethod
    def _avoidable(members: Sequence[wire.Member], exclude: Iterable[WorkerId]) -> set[WorkerId]:
        excluded = set(exclude)
        return excluded if any(m.info.worker_id not in excluded for m in members) else set()

    @contextmanager
    def prefilling(self, worker_id: WorkerId, active_tokens: int) -> Iterator[None]:
        """Count a request in flight."""
        with _counted(self._sent, worker_id, active_tokens), _counted(self._requests, worker_id, 1):
            yield

    @contextmanager
    def decoding(self, worker_id: WorkerId) -> Iterator[None]:
        """Count a sequence that is decoded there."""
        with _counted(self._streams, worker_id, 1):
            yield


@contextmanager
def _counted(counts: dict[WorkerId, int], worker_id: WorkerId, amount: int) -> Iterator[None]:
    """Incarnations come and go: one without requests is not listed."""
    counts[worker_id] = counts.get(worker_id, 0) + amount
    try:
        yield
    finally:
        counts[worker_id] -= amount
        if not counts[worker_id]:
            del counts[worker_id]
