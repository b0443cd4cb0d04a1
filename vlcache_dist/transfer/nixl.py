"""READs between registered arenas through NIXL (UCX): cuda_ipc or RDMA between GPUs, shared memory or TCP between CPUs.

What was learnt about NIXL 1.5 and is kept here:

* The agent is not thread-safe: one owner thread does everything, fed by a queue.
* There is no safe cancel. A READ that missed its deadline fails at once for its reader, but its handle is kept and
  polled until it is terminal; until then the destination may still be written (``Transfer.terminal``). Nor does
  forgetting the peer stop it, so a peer is forgotten only when nothing is under way from it.
* A stopped peer stays "in progress" for ever: deadlines are ours, on the local monotonic clock.
* An error may concern one descriptor of several: after an error the destination stays at risk for ``SETTLE_S``.
* A UCX that has not been polled for a while aborts its process if it then finds, over TCP, a READ whose reader has
  gone. So a reader that closes waits up to ``CLOSE_S`` for its READs to end; a reader that dies cannot.
* The progress thread spins: it is off, and the owner thread polls, fast while transfers are under way and slowly
  otherwise (UCX over TCP needs the passive side to be polled as well; see ``attend``).
* Agent names must never be reused: the worker id in them contains the incarnation.
* Peers ship integers and NIXL's own metadata, never its pickled descriptor lists.

UCX's settings stand in ``transfer.ucx``.
"""

from __future__ import annotations

import atexit
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch

from vlcache_dist.errors import ConfigError, LayoutMismatch, TransferFailed, TransferTimeout
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.base import PeerInfo, Piece, check_pieces
from vlcache_dist.transfer.checksum import checksum
from vlcache_dist.transfer.huge_pages import advise_huge_pages
from vlcache_dist.transfer.ucx import configure_ucx
from vlcache_dist.types import WorkerId

log = logging.getLogger(__name__)

BUSY_POLL_S = 50e-6
IDLE_POLL_S = 2e-3
AWAKE_S = 0.005  #: how long after the last transfer the owner thread keeps polling fast
CLOSE_S = 0.5
SETTLE_S = 3.0  #: how long a destination stays at risk after an error; as long as TCP takes to notice a cut link


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
    settled_at: float = 0.0  # after an error

    @property
    def terminal(self) -> bool:
        return self.over.is_set()

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


class NixlTransport:
    """Owns one agent and its thread. ``arena``: 1-D contiguous tensor, registered for life; the CUDA context exists
    because it does. Must not be an ``expandable_segments`` allocation. On CPU it should not have been written yet: then
    it gets huge pages."""

    def __init__(self, worker_id: WorkerId, arena: torch.Tensor, layout: KVLayout) -> None:
        """Raises ConfigError if NIXL is missing or its UCX backend cannot be started."""
        self._arena = arena
        self._base = arena.data_ptr()
        self._nbytes = arena.numel() * arena.element_size()
        self._device = "cpu" if arena.device.type == "cpu" else f"cuda:{arena.device.index or 0}"
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # no command enters after the last one
        self._closed = False
        # The owner thread's:
        self._running: list[NixlTransfer] = []
        self._late: list[NixlTransfer] = []
        self._failed: list[NixlTransfer] = []
        self._peers: dict[str, PeerInfo] = {}
        self._unwanted: dict[str, bool] = {}  # agents to be forgotten once idle; True: after an error
        self._attend_until = 0.0
        started: Future[bytes] = Future()
        self._thread = threading.Thread(
            target=self._own, args=(worker_id, started), name=f"nixl-{worker_id}", daemon=True
        )
        self._thread.start()
        self.info = PeerInfo(
            worker_id=worker_id,
            agent=worker_id,
            metadata=started.result(),
            base=self._base,
            nbytes=self._nbytes,
            device=self._device,
            host=socket.gethostname(),
            layout=layout,
        )
        atexit.register(self.close)  # a thread that is inside UCX when Python ends aborts the process

    # -- any thread ---------------------------------------------------------------------------------------------

    def connect(self, peer: PeerInfo) -> None:
        """See ``Transport.connect``."""
        if difference := self.info.layout.difference(peer.layout):
            raise LayoutMismatch(f"{peer.worker_id} keeps other KV than this worker: {difference}")
        self._ask(lambda: self._add(peer))

    def disconnect(self, agent: str) -> None:
        """See ``Transport.disconnect``."""
        if not self._closed:
            self._ask(lambda: self._forget(agent, broken=False))

    def read(self, peer: PeerInfo, pieces: Sequence[Piece], deadline_s: float) -> NixlTransfer:
        """See ``Transport.read``."""
        check_pieces(pieces, self._nbytes, peer.nbytes)
        transfer = NixlTransfer(tuple(pieces), peer, time.monotonic() + deadline_s)
        transfer.future.set_running_or_notify_cancel()  # a reader that gives up cannot cancel it: the bytes still come
        if not self._enter(lambda: self._post(transfer)):
            self._end(transfer)
            transfer.future.set_exception(TransferFailed("the transport is closed"))
        return transfer

    def checksum(self, offset: int, nbytes: int) -> bytes:
        """See ``Transport.checksum``."""
        return checksum(self._arena, offset, nbytes)

    def attend(self, seconds: float) -> None:
        """See ``Transport.attend``."""
        until = time.monotonic() + seconds

        def attend() -> None:
            self._attend_until = max(self._attend_until, until)

        self._enter(attend)

    def close(self) -> None:
        """Stop the owner thread and destroy the agent: with it gone, nothing writes. Transfers under way fail."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def _enter(self, command: Callable[[], None]) -> bool:
        with self._gate:
            if not self._closed:
                self._commands.put(command)
            return not self._closed

    def _ask(self, work: Callable[[], None]) -> None:
        """Have the owner thread do it, and wait."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        if not self._enter(run):
            raise TransferFailed("the transport is closed")
        done.result()

    # -- owner thread -------------------------------------------------------------------------------------------

    def _own(self, worker_id: WorkerId, started: Future[bytes]) -> None:
        try:
            self._start_agent(worker_id)
            metadata = bytes(self._agent.get_agent_metadata())
        except Exception as error:
            if not isinstance(error, ConfigError):
                error = ConfigError(f"NIXL cannot be started: {type(error).__name__}: {error}")
            started.set_exception(error)
            return
        started.set_result(metadata)
        try:
            self._loop()
        except BaseException:
            log.exception("the transport of %s failed", worker_id)
        finally:
            self._shut()

    def _start_agent(self, worker_id: WorkerId) -> None:
        cuda = self._device != "cpu"
        configure_ucx(cuda=cuda)
        api = _api()
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it reports every agent on stdout
        if cuda:
            torch.cuda.set_device(self._arena.device)
        else:
            advise_huge_pages(self._base, self._nbytes)
        config = api.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"])
        self._agent = api.nixl_agent(worker_id, config)
        if "UCX" not in self._agent.backends:
            raise ConfigError("NIXL has no UCX backend here; see its log")
        self._memory, self._device_id = _memory(self._device)
        region = (self._base, self._nbytes, self._device_id, "")
        self._registered = self._agent.register_memory([region], self._memory)

    def _loop(self) -> None:
        awake_until = 0.0
        while True:
            now = time.monotonic()
            if self._running:
                awake_until = now + AWAKE_S
            patience = BUSY_POLL_S if now < max(awake_until, self._attend_until) else IDLE_POLL_S
            try:
                command = self._commands.get(timeout=patience)
            except queue.Empty:
                self._progress()
            else:
                if command is None:
                    return
                command()
                awake_until = time.monotonic() + AWAKE_S
            self._poll()

    def _progress(self) -> None:
        """Let UCX work for peers that read from here. Notifications are not part of the protocol: dropped."""
        try:
            self._agent.get_new_notifs()
        except Exception as error:
            log.warning("NIXL made no progress: %s: %s", type(error).__name__, error)

    def _add(self, peer: PeerInfo) -> None:
        if (known := self._peers.get(peer.agent)) is not None:
            if known == peer and not self._unwanted.get(peer.agent, False):
                self._unwanted.pop(peer.agent, None)
                return
            self._forget(peer.agent, broken=True)
            if peer.agent in self._peers:
                raise TransferFailed(f"{peer.worker_id} cannot be met again before its READs have ended")
        _memory(peer.device)
        try:
            name = self._agent.add_remote_agent(peer.metadata)
        except Exception as error:
            raise TransferFailed(f"{peer.worker_id} cannot be reached: {type(error).__name__}: {error}") from error
        name = name.decode() if isinstance(name, bytes) else name
        if name != peer.agent:
            if name not in self._peers:
                self._remove(name)
            raise TransferFailed(f"the metadata of {peer.agent} names {name}")
        self._peers[peer.agent] = peer

    def _forget(self, agent: str, *, broken: bool) -> None:
        """Now if nothing is under way from it, else as soon as nothing is; until then it is not read from."""
        if agent in self._peers:
            self._unwanted[agent] = broken or self._unwanted.get(agent, False)
            self._forget_idle()

    def _forget_idle(self) -> None:
        busy = {transfer.peer.agent for group in (self._running, self._late) for transfer in group}
        for agent in [agent for agent in self._unwanted if agent not in busy]:
            del self._unwanted[agent], self._peers[agent]
            self._remove(agent)

    def _remove(self, agent: str) -> None:
        try:
            self._agent.remove_remote_agent(agent)
        except Exception as error:
            log.info("forgetting %s: %s: %s", agent, type(error).__name__, error)

    def _post(self, transfer: NixlTransfer) -> None:
        peer = transfer.peer
        if self._peers.get(peer.agent) != peer or peer.agent in self._unwanted:
            self._end(transfer)
            transfer.future.set_exception(TransferFailed(f"{peer.worker_id} is not connected"))
            return
        try:
            memory, device_id = _memory(peer.device)
            here = [(self._base + p.local_offset, p.nbytes, self._device_id) for p in transfer.pieces]
            there = [(peer.base + p.remote_offset, p.nbytes, device_id) for p in transfer.pieces]
            local = self._agent.get_xfer_descs(np.array(here, np.uint64), self._memory)
            remote = self._agent.get_xfer_descs(np.array(there, np.uint64), memory)
            transfer.handle = self._agent.initialize_xfer("READ", local, remote, peer.agent)
        except Exception as error:
            self._end(transfer)  # nothing was posted
            self._fail(transfer, error)
            return
        self._running.append(transfer)
        self._settle(transfer, self._agent.transfer)

    def _poll(self) -> None:
        for transfer in [*self._running, *self._late]:
            self._settle(transfer, self._agent.check_xfer_state)
        if self._failed:
            now = time.monotonic()
            for transfer in [t for t in self._failed if now >= t.settled_at]:
                self._end(transfer)
        if self._unwanted:
            self._forget_idle()

    def _settle(self, transfer: NixlTransfer, step: Callable[[Any], str]) -> None:
        """Post or check a transfer, and draw the conclusions."""
        try:
            state = step(transfer.handle)
            if state == "ERR":
                raise TransferFailed("NIXL reports an error")
        except Exception as error:
            self._leave(transfer)
            transfer.settled_at = time.monotonic() + SETTLE_S
            self._failed.append(transfer)
            self._fail(transfer, error)
            return
        late = time.monotonic() > transfer.deadline
        if late and not transfer.future.done():
            message = f"{transfer.nbytes} bytes from {transfer.peer.worker_id} did not arrive in time"
            transfer.future.set_exception(TransferTimeout(message))
        if state == "DONE":
            self._end(transfer)
            if not transfer.future.done():
                transfer.future.set_result(None)
        elif late and transfer in self._running:
            self._running.remove(transfer)
            self._late.append(transfer)

    def _fail(self, transfer: NixlTransfer, error: Exception) -> None:
        self._forget(transfer.peer.agent, broken=True)
        if not transfer.future.done():
            reason = f"READ from {transfer.peer.worker_id}: {type(error).__name__}: {error}"
            transfer.future.set_exception(TransferFailed(reason))

    def _leave(self, transfer: NixlTransfer) -> None:
        for group in (self._running, self._late, self._failed):
            if transfer in group:
                group.remove(transfer)

    def _end(self, transfer: NixlTransfer) -> None:
        """Terminal: nothing writes into the destination any more."""
        self._leave(transfer)
        self._release(transfer)
        transfer.over.set()

    @staticmethod
    def _release(transfer: NixlTransfer) -> None:
        handle, transfer.handle = transfer.handle, None
        if handle is not None:
            try:
                handle.release()
            except Exception as error:
                log.info("releasing a transfer handle: %s: %s", type(error).__name__, error)

    def _shut(self) -> None:
        with self._gate:
            self._closed = True
        left = [*self._running, *self._late, *self._failed]
        for transfer in left:
            if not transfer.future.done():
                transfer.future.set_exception(TransferFailed("the transport was closed"))
        end = time.monotonic() + CLOSE_S
        while (self._running or self._late) and time.monotonic() < end:
            self._poll()
            time.sleep(BUSY_POLL_S)
        for transfer in left:
            self._release(transfer)
        for agent in self._peers:
            self._remove(agent)
        try:
            self._agent.deregister_memory(self._registered)
        except Exception as error:
            log.info("deregistering the arena: %s: %s", type(error).__name__, error)
        self._peers.clear()
        del self._registered, self._agent
        for transfer in left:
            self._end(transfer)
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command()


def _memory(device: str) -> tuple[str, int]:
    """NIXL's memory type and device id of ``PeerInfo.device``. Raises TransferFailed for what is no device."""
    if device == "cpu":
        return "DRAM", 0
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise TransferFailed(f"{device!r} is no device that can be read from")
    return "VRAM", int(index)
