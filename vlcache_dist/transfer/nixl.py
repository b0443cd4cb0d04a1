"""READs between registered arenas through NIXL (UCX): cuda_ipc or RDMA between GPUs, shared memory or TCP between CPUs.

What was learnt about NIXL 1.5 and is kept here:

* The agent is not thread-safe: one owner thread does everything, fed by a queue.
* There is no safe cancel. A READ that missed its deadline fails at once for its reader, but its handle is kept and
  polled until it is terminal; until then the destination may still be written (``Transfer.terminal``).
* A stopped peer stays "in progress" for ever: deadlines are ours, on the local monotonic clock.
* The progress thread spins: it is off, and the owner thread polls, fast while transfers are under way and slowly
  otherwise (UCX over TCP needs the passive side to be polled as well).
* Agent names must never be reused: the worker id in them contains the incarnation.

UCX is configured by environment before the agent exists. ``UCX_TLS`` of the user wins; the default on a machine without
CUDA is ``sysv,posix,cma,self,tcp`` (shared memory alone fails: control traffic needs tcp), with CUDA it is left to UCX.
``UCX_TCP_KEEPIDLE``, ``KEEPINTVL`` and ``KEEPCNT`` are set so that a cut link is noticed in about 3 s instead of 19.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from vlcache_dist.errors import ConfigError, LayoutMismatch, TransferFailed, TransferTimeout
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.base import PeerInfo, Piece
from vlcache_dist.types import WorkerId

log = logging.getLogger(__name__)

BUSY_POLL_S = 50e-6
IDLE_POLL_S = 2e-3
AWAKE_S = 0.005  #: how long after the last transfer the owner thread keeps polling fast


def configure_ucx(device: torch.device) -> None:
    """Set what the user has not set. Must run before the first agent of the process."""
    defaults = {"UCX_TCP_KEEPIDLE": "1s", "UCX_TCP_KEEPINTVL": "1s", "UCX_TCP_KEEPCNT": "2", "UCX_LOG_LEVEL": "error"}
    if device.type == "cpu":
        defaults["UCX_TLS"] = "sysv,posix,cma,self,tcp"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _api() -> Any:
    for package in ("nixl_cu13", "nixl_cu12", "nixl"):
        try:
            return import_module(f"{package}._api")
        except ImportError:
            continue
    raise ConfigError("NIXL is not installed: pip install nixl-cu13 (it also runs without CUDA)")


@dataclass(slots=True, eq=False)
class NixlTransfer:
    """See ``base.Transfer``."""

    pieces: Sequence[Piece]
    peer: PeerInfo
    deadline: float
    future: Future[None] = field(default_factory=Future)
    handle: Any = None
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def terminal(self) -> bool:
        return self.over.is_set()


class NixlTransport:
    """Owns one agent and its thread. ``arena``: 1-D contiguous tensor, registered for life; the CUDA context exists
    because it does. Must not be an ``expandable_segments`` allocation."""

    def __init__(self, worker_id: WorkerId, arena: torch.Tensor, layout: KVLayout) -> None:
        """Raises ConfigError if NIXL is missing or its UCX backend cannot be started."""
        self._arena = arena
        self._nbytes = arena.numel() * arena.element_size()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: list[NixlTransfer] = []
        self._late: list[NixlTransfer] = []
        self._peers: dict[str, PeerInfo] = {}
        self._closed = False
        started: Future[bytes] = Future()
        self._thread = threading.Thread(
            target=self._own, args=(worker_id, started), name=f"nixl-{worker_id}", daemon=True
        )
        self._thread.start()
        metadata = started.result()
        device = "cpu" if arena.device.type == "cpu" else f"cuda:{arena.device.index or 0}"
        self.info = PeerInfo(
            worker_id=worker_id,
            agent=worker_id,
            metadata=metadata,
            base=arena.data_ptr(),
            nbytes=self._nbytes,
            device=device,
            host=socket.gethostname(),
            layout=layout,
        )

    # -- any thread ---------------------------------------------------------------------------------------------

    def connect(self, peer: PeerInfo) -> None:
        """See ``Transport.connect``."""
        if difference := self.info.layout.difference(peer.layout):
            raise LayoutMismatch(f"{peer.worker_id} keeps other KV than this worker: {difference}")
        if self._peers.get(peer.agent) == peer:
            return
        done: Future[None] = Future()
        self._do(done, lambda: self._add(peer))
        done.result()

    def disconnect(self, agent: str) -> None:
        """See ``Transport.disconnect``."""
        done: Future[None] = Future()
        self._do(done, lambda: self._remove(agent))
        done.result()

    def read(self, peer: PeerInfo, pieces: Sequence[Piece], deadline_s: float) -> NixlTransfer:
        """See ``Transport.read``."""
        for piece in pieces:
            if piece.nbytes < 1 or min(piece.remote_offset, piece.local_offset) < 0:
                raise ValueError(f"{piece} is no range")
            if piece.local_offset + piece.nbytes > self._nbytes or piece.remote_offset + piece.nbytes > peer.nbytes:
                raise ValueError(f"{piece} leaves an arena of {self._nbytes} here, {peer.nbytes} there")
        transfer = NixlTransfer(tuple(pieces), peer, time.monotonic() + deadline_s)
        transfer.future.set_running_or_notify_cancel()  # a reader that gives up cannot cancel it: the bytes still come
        if self._closed:
            transfer.over.set()
            transfer.future.set_exception(TransferFailed("the transport is closed"))
        else:
            self._commands.put(lambda: self._post(transfer))
        return transfer

    def close(self) -> None:
        """Stop the owner thread and destroy the agent. Transfers under way fail; with the agent gone, nothing writes."""
        if self._closed:
            return
        self._closed = True
        self._commands.put(None)
        self._thread.join()

    def _do(self, done: Future[None], work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        if self._closed:
            done.set_exception(TransferFailed("the transport is closed"))
        else:
            self._commands.put(run)

    # -- owner thread -------------------------------------------------------------------------------------------

    def _own(self, worker_id: WorkerId, started: Future[bytes]) -> None:
        try:
            configure_ucx(self._arena.device)
            api = _api()
            if self._arena.device.type == "cuda":
                torch.cuda.set_device(self._arena.device)
            config = api.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"])
            self._agent = api.nixl_agent(worker_id, config)
            if "UCX" not in self._agent.backends:
                raise ConfigError("NIXL has no UCX backend here; see its log")
            self._memory = "DRAM" if self._arena.device.type == "cpu" else "VRAM"
            self._device_id = 0 if self._arena.device.type == "cpu" else self._arena.device.index or 0
            region = (self._arena.data_ptr(), self._nbytes, self._device_id, "")
            registered = self._agent.register_memory([region], self._memory)
            started.set_result(bytes(self._agent.get_agent_metadata()))
        except Exception as error:
            if isinstance(error, ConfigError):
                started.set_exception(error)
            else:
                started.set_exception(ConfigError(f"NIXL cannot be started: {type(error).__name__}: {error}"))
            return
        try:
            self._loop()
        finally:
            self._shut(registered)

    def _loop(self) -> None:
        awake_until = 0.0
        while True:
            now = time.monotonic()
            if self._running:
                awake_until = now + AWAKE_S
            patience = BUSY_POLL_S if now < awake_until else IDLE_POLL_S
            try:
                command = self._commands.get(timeout=patience)
                if command is None:
                    return
                command()
                awake_until = time.monotonic() + AWAKE_S
            except queue.Empty:
                self._progress()
            self._poll()

    def _progress(self) -> None:
        """Let UCX work for peers that read from here."""
        try:
            self._agent.update_notifs()
        except Exception as error:
            log.warning("NIXL made no progress: %s: %s", type(error).__name__, error)

    def _add(self, peer: PeerInfo) -> None:
        try:
            if peer.agent in self._peers:
                self._remove(peer.agent)
            name = self._agent.add_remote_agent(peer.metadata)
            name = name.decode() if isinstance(name, bytes) else name
            if name != peer.agent:
                self._agent.remove_remote_agent(name)
                raise TransferFailed(f"the metadata of {peer.agent} names {name}")
        except TransferFailed:
            raise
        except Exception as error:
            raise TransferFailed(f"{peer.worker_id} cannot be reached: {type(error).__name__}: {error}") from error
        self._peers[peer.agent] = peer

    def _remove(self, agent: str) -> None:
        if self._peers.pop(agent, None) is None:
            return
        try:
            self._agent.remove_remote_agent(agent)
        except Exception as error:
            log.info("forgetting %s: %s: %s", agent, type(error).__name__, error)

    def _post(self, transfer: NixlTransfer) -> None:
        peer = transfer.peer
        if self._peers.get(peer.agent) != peer:
            transfer.over.set()
            transfer.future.set_exception(TransferFailed(f"{peer.worker_id} is not connected"))
            return
        remote_memory, remote_device = ("DRAM", 0) if peer.device == "cpu" else ("VRAM", int(peer.device.split(":")[1]))
        base = self._arena.data_ptr()
        try:
            local = self._agent.get_xfer_descs(
                [(base + p.local_offset, p.nbytes, self._device_id) for p in transfer.pieces], self._memory
            )
            remote = self._agent.get_xfer_descs(
                [(peer.base + p.remote_offset, p.nbytes, remote_device) for p in transfer.pieces], remote_memory
            )
            transfer.handle = self._agent.initialize_xfer("READ", local, remote, peer.agent)
            state = self._agent.transfer(transfer.handle)
        except Exception as error:
            self._fail(transfer, error)
            return
        self._running.append(transfer)
        self._settle(transfer, state)

    def _poll(self) -> None:
        for transfer in [*self._running, *self._late]:
            try:
                state = self._agent.check_xfer_state(transfer.handle)
            except Exception as error:
                self._fail(transfer, error)
                continue
            self._settle(transfer, state)

    def _settle(self, transfer: NixlTransfer, state: str) -> None:
        if state == "ERR":
            self._fail(transfer, RuntimeError("NIXL says ERR"))
            return
        late = time.monotonic() > transfer.deadline
        if late and not transfer.future.done():
            nbytes = sum(piece.nbytes for piece in transfer.pieces)
            transfer.future.set_exception(TransferTimeout(f"{nbytes} bytes from {transfer.peer.worker_id}: not in time"))
        if state == "DONE":
            self._end(transfer)
            if not transfer.future.done():
                transfer.future.set_result(None)
        elif late and transfer in self._running:
            self._running.remove(transfer)
            self._late.append(transfer)

    def _fail(self, transfer: NixlTransfer, error: Exception) -> None:
        self._end(transfer)
        self._remove(transfer.peer.agent)
        if not transfer.future.done():
            reason = f"READ from {transfer.peer.worker_id}: {type(error).__name__}: {error}"
            transfer.future.set_exception(TransferFailed(reason))

    def _end(self, transfer: NixlTransfer) -> None:
        """Terminal: nothing writes into the destination any more."""
        for group in (self._running, self._late):
            if transfer in group:
                group.remove(transfer)
        if transfer.handle is not None:
            try:
                transfer.handle.release()
            except Exception as error:
                log.info("releasing a transfer handle: %s: %s", type(error).__name__, error)
            transfer.handle = None
        transfer.over.set()

    def _shut(self, registered: Any) -> None:
        left = [*self._running, *self._late]
        for transfer in left:
            self._end(transfer)
        for agent in list(self._peers):
            self._remove(agent)
        try:
            self._agent.deregister_memory(registered)
        except Exception as error:
            log.info("deregistering the arena: %s: %s", type(error).__name__, error)
        del self._agent
        for transfer in left:
            if not transfer.future.done():
                transfer.future.set_exception(TransferFailed("the transport was closed"))
