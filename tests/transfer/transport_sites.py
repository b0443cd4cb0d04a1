"""Where the contract suite runs: each site makes readers in this process and remotes to read from, which can be filled,
stopped, resumed and killed."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.base import PeerInfo, Piece, Transport
from vlcache_dist.transfer.memory import NO_FAULT, Fault, MemoryNetwork, MemoryTransport
from vlcache_dist.transfer.nixl import NixlTransport

LAYOUT = KVLayout(num_layers=4, num_kv_heads=1, head_dim=8, hidden=32, dtype="float32", model="tiny")
ARENA_BYTES = 8 << 20

_incarnations = itertools.count(1)


def worker_id(name: str) -> str:
    return f"{name}#{os.getpid()}-{next(_incarnations)}"


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


class Remote(Protocol):
    info: PeerInfo

    def fill(self, offset: int, nbytes: int, seed: int) -> torch.Tensor:
        """Put random bytes into its arena, and return them."""
        ...

    def stop(self) -> None: ...

    def resume(self) -> None: ...

    def kill(self) -> None: ...


class Site(Protocol):
    name: str
    stopped_peer_is_readable: bool  #: the reader copies by itself (shared memory)

    def reader(
        self, layout: KVLayout = LAYOUT, arena: torch.Tensor | None = None
    ) -> tuple[Transport, torch.Tensor]: ...

    def remote(self, name: str = "remote", layout: KVLayout = LAYOUT) -> Remote: ...

    def close(self) -> None: ...


class MemoryRemote:
    def __init__(self, network: MemoryNetwork, name: str, layout: KVLayout) -> None:
        self.arena = torch.zeros(ARENA_BYTES, dtype=torch.uint8)
        self.network = network
        self.transport = MemoryTransport(network, worker_id(name), self.arena, layout)
        self.info = self.transport.info

    def fill(self, offset: int, nbytes: int, seed: int) -> torch.Tensor:
        self.arena[offset : offset + nbytes] = data = random_bytes(nbytes, seed)
        return data

    def stop(self) -> None:
        self.network.freeze(self.info.agent)

    def resume(self) -> None:
        self.network.thaw(self.info.agent)

    def kill(self) -> None:
        self.network.kill(self.info.agent)


class MemorySite:
    name = "memory"
    stopped_peer_is_readable = False

    def __init__(self) -> None:
        self.network = MemoryNetwork(self.script)
        self.transports: list[Transport] = []

    @staticmethod
    def script(reader: PeerInfo, peer: PeerInfo, pieces: Sequence[Piece]) -> Fault:
        """Large READs take a moment, as they do elsewhere."""
        return Fault(delay_s=0.01) if sum(piece.nbytes for piece in pieces) > 1 << 20 else NO_FAULT

    def reader(self, layout: KVLayout = LAYOUT, arena: torch.Tensor | None = None) -> tuple[Transport, torch.Tensor]:
        arena = torch.zeros(ARENA_BYTES, dtype=torch.uint8) if arena is None else arena
        self.transports.append(MemoryTransport(self.network, worker_id("reader"), arena, layout))
        return self.transports[-1], arena

    def remote(self, name: str = "remote", layout: KVLayout = LAYOUT) -> MemoryRemote:
        return MemoryRemote(self.network, name, layout)

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
        self.network.close()


class NixlRemote:
    """A process of its own (``nixl_peer.py``)."""

    START_S = 60.0
    REPLY_S = 10.0

    def __init__(self, environment: dict[str, str], name: str, layout: KVLayout) -> None:
        script = Path(__file__).with_name("nixl_peer.py")
        command = [sys.executable, str(script), worker_id(name), str(ARENA_BYTES), msgspec.json.encode(layout).decode()]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        self._info: PeerInfo | None = None

    @property
    def info(self) -> PeerInfo:
        if self._info is None:
            self._info = msgspec.msgpack.decode(base64.b64decode(self._reply(self.START_S)), type=PeerInfo)
        return self._info

    def fill(self, offset: int, nbytes: int, seed: int) -> torch.Tensor:
        self._do(do="fill", offset=offset, nbytes=nbytes, seed=seed)
        return random_bytes(nbytes, seed)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        assert wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 60)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; also ends a stopped process."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue

    def _do(self, **command: object) -> None:
        assert self.info
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        assert self._reply(self.REPLY_S) == "ok"

    def _reply(self, seconds: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError(f"the remote says nothing for {seconds} s")
        return json.loads(self.process.stdout.readline())


class NixlSite:
    """``transports``: UCX_TLS for both sides; None: the default. UCX reads it when an agent is made."""

    def __init__(self, name: str, transports: str | None) -> None:
        self.name = name
        self.stopped_peer_is_readable = transports is None
        self.environment = {} if transports is None else {"UCX_TLS": transports}
        self.transports: list[Transport] = []
        self.remotes: list[NixlRemote] = []

    def reader(self, layout: KVLayout = LAYOUT, arena: torch.Tensor | None = None) -> tuple[Transport, torch.Tensor]:
        arena = torch.zeros(ARENA_BYTES, dtype=torch.uint8) if arena is None else arena
        before = os.environ.get("UCX_TLS")
        os.environ.pop("UCX_TLS", None)
        os.environ.update(self.environment)
        try:
            self.transports.append(NixlTransport(worker_id("reader"), arena, layout))
        finally:
            os.environ.pop("UCX_TLS", None)
            if before is not None:
                os.environ["UCX_TLS"] = before
        return self.transports[-1], arena

    def remote(self, name: str = "remote", layout: KVLayout = LAYOUT) -> NixlRemote:
        self.remotes.append(NixlRemote(self.environment, name, layout))
        return self.remotes[-1]

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
        for remote in self.remotes:
            remote.close()


def make_site(name: str) -> Site:
    match name:
        case "memory":
            return MemorySite()
        case "nixl-shm":
            return NixlSite(name, None)
        case "nixl-tcp":
            return NixlSite(name, "tcp,self")
    raise ValueError(name)
