"""Followers as Ray actors beside their leader: one bundle of its placement group each, so on its node, with GPUs of
their own. Ray starts and ends them; what they do reaches them over the leader's links."""

from __future__ import annotations

from typing import Any

import msgspec
import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlcache_dist.errors import ConfigError
from vlcache_dist.parallel.link import Invitation

LEAST_CPU = 0.01  #: a bundle cannot be empty; followers compute outside Ray's books


def bundles(size: int, gpus: float, leader: dict[str, float]) -> list[dict[str, float]]:
    """The placement group of a worker with ``size`` ranks of ``gpus`` GPUs each; ``leader``: what its first rank needs
    besides."""
    each = {"GPU": gpus} if gpus else {"CPU": LEAST_CPU}
    return [{**each, **leader}, *[dict(each) for _ in range(size - 1)]]


@ray.remote(num_cpus=0, max_restarts=0)
class FollowerActor:
    """A follower in a process of its own."""

    def run(self, invitation: bytes) -> None:
        """Until the leader is gone."""
        from vlcache_dist.actor import limit_cpu_threads
        from vlcache_dist.assembly import nixl_transport
        from vlcache_dist.parallel.follower import follow, leave_soon

        limit_cpu_threads()
        follow(msgspec.json.decode(invitation, type=Invitation), nixl_transport, on_leader_lost=leave_soon)


class _Actor:
    """See ``group.Handle``."""

    def __init__(self, actor: Any, invitation: Invitation) -> None:
        self._actor = actor
        self._running = actor.run.remote(msgspec.json.encode(invitation))

    def alive(self) -> bool:
        return not self._ended(0)

    def kill(self) -> None:
        ray.kill(self._actor)

    def wait(self, timeout_s: float) -> bool:
        ended = self._ended(timeout_s)
        if ended:
            self.kill()  # its process would stay
        return ended

    def _ended(self, timeout_s: float) -> bool:
        done, _ = ray.wait([self._running], timeout=timeout_s)
        return bool(done)


class Actors:
    """See ``group.Launcher``. For a leader inside a placement group made of ``bundles``; ``gpus`` as there."""

    def __init__(self, host: str, gpus: float) -> None:
        """Raises ConfigError outside a placement group."""
        self.host = host
        self._gpus = gpus
        group = ray.util.get_current_placement_group()
        if group is None:
            raise ConfigError("engine.tensor_parallel: this worker has no placement group for its other ranks")
        self._group = group

    def start(self, invitation: Invitation) -> _Actor:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=invitation.rank)
        actor = FollowerActor.options(num_gpus=self._gpus, scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]
        return _Actor(actor, invitation)

    def device(self, rank: int, leader: str) -> str:
        """Ray shows every actor its own GPUs only."""
        return "cpu" if torch.device(leader).type == "cpu" else "cuda:0"
