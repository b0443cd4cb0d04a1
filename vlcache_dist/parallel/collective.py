"""Sums and copies over the ranks of one worker: NCCL between GPUs, gloo between CPUs.

The process groups are made directly and not through ``torch.distributed.init_process_group``, whose default group is
one per process: a process may hold several workers.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vlcache_dist.errors import ConfigError

PASS_S = 600.0  #: a collective that takes longer fails by itself; who is lost is noticed long before that
MEET_S = 120.0  #: for all ranks to come together


def host_store(host: str) -> dist.TCPStore:
    """The leader's key-value store, at a free port of ``host``, through which the ranks find each other. It must live
    as long as the group."""
    return dist.TCPStore(host, 0, None, True, timedelta(seconds=MEET_S), wait_for_workers=False)


def join_store(host: str, port: int) -> dist.TCPStore:
    """A follower's connection to the leader's store. Raises RuntimeError if nobody answers."""
    return dist.TCPStore(host, port, None, False, timedelta(seconds=MEET_S))


class Collective:
    """One rank's end. Collectives run on the caller's current stream, in the same order on every rank."""

    def __init__(self, store: dist.Store, host: str, rank: int, size: int, device: torch.device) -> None:
        """Returns when all ranks have met. ``host``: an address of this machine that the others reach. Raises
        ConfigError if this build of torch has no NCCL, RuntimeError if the others do not come in time."""
        self.rank, self.size = rank, size
        self._store = store
        self._abortable = device.type == "cuda"
        self._group: Any = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, host, rank, size)
        self.all_reduce(torch.zeros(1, device=device))  # NCCL connects at the first use
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; on CUDA enqueued, not waited for. ``x`` must be contiguous."""
        self._group.allreduce([x]).wait()
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, in place. ``x`` must be contiguous."""
        self._group.broadcast(x, 0).wait()
        return x

    def abort(self) -> None:
        """Leave the others, and end what is under way with an error. Any thread; idempotent. Over gloo there is
        nothing to do: it sees the closed connections of ranks that have ended."""
        if self._abortable:
            self._group.abort()


def _gloo(store: dist.Store, host: str, rank: int, size: int) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=PASS_S)
    return dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int) -> Any:
    if not dist.is_nccl_available():
        raise ConfigError("engine.tensor_parallel on GPUs needs a torch that was built with NCCL")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=PASS_S)
    return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
