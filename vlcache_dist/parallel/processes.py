"""Followers as processes of their own on this machine: for ``LLM`` and for workers outside Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import msgspec
import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.parallel.link import Invitation

COMMAND = (sys.executable, "-m", "vlcache_dist.parallel.follower")


class _Process:
    """See ``group.Handle``."""

    def __init__(self, command: Sequence[str], invitation: Invitation) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with self._process.stdin as stdin:  # not on the command line, where everybody could read the secret
            stdin.write(msgspec.json.encode(invitation) + b"\n")

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


class Processes:
    """See ``group.Launcher``. Followers end with their leader, however it ends. ``command`` starts one."""

    host = "127.0.0.1"

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = tuple(command)

    def start(self, invitation: Invitation) -> _Process:
        return _Process(self._command, invitation)

    def device(self, rank: int, leader: str) -> str:
        """The GPUs behind the leader's, in order, and from the first on behind the last. Raises ConfigError if there
        are too few."""
        device = torch.device(leader)
        if device.type == "cpu":
            return leader
        count = torch.cuda.device_count()
        if rank >= count:
            raise ConfigError(f"engine.tensor_parallel: rank {rank} finds no GPU of its own among the {count} here")
        return f"cuda:{((device.index or 0) + rank) % count}"
