"""Followers as threads of the test's process, over real gloo and real links."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.parallel import follower
from vlcache_dist.parallel.link import Invitation
from vlcache_dist.transfer.base import Transport


def no_transport(worker_id: str, arena: torch.Tensor, layout: KVLayout) -> Transport:
    raise ConfigError("this follower has no transport")


class _Thread:
    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error

    def alive(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        """A thread ends with its links, which the leader closes."""

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


@dataclass
class Threads:
    """See ``group.Launcher``."""

    load: follower.LoadShard | None = None
    make_transport: Callable[[str, torch.Tensor, KVLayout], Transport] = no_transport
    host: str = "127.0.0.1"
    threads: list[_Thread] = field(default_factory=list)

    def start(self, invitation: Invitation) -> _Thread:
        thread = _Thread(lambda: follower.follow(invitation, self.make_transport, self.load))
        self.threads.append(thread)
        return thread

    def device(self, rank: int, leader: str) -> str:
        return leader
