"""The transport's twin inside one process: real copies between real arenas, and faults by script.

A ``MemoryNetwork`` is the wire. Every READ asks its ``script`` what happens to it; time passes by ``clock`` and
``call_later``, real by default, virtual in tests that run many thousand transfers.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from vlcache_dist.errors import LayoutMismatch, TransferFailed, TransferTimeout
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.base import PeerInfo, Piece, check_pieces
from vlcache_dist.transfer.checksum import checksum
from vlcache_dist.types import WorkerId


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one READ.

    ``delay_s``        when its bytes are copied, half of them at half of that time
    ``drop``           no bytes, no end: the peer never answers this READ; terminal with the peer's death
    ``corrupt``        one bit arrives wrong, and nobody says so
    ``duplicate_s``    the bytes are written a second time so long after the first; done only then
    ``error``          half of the bytes, then the transport reports an error
    """

    delay_s: float = 0.0
    drop: bool = False
    corrupt: bool = False
    duplicate_s: float | None = None
    error: bool = False


NO_FAULT = Fault()

Script = Callable[[PeerInfo, PeerInfo, Sequence[Piece]], Fault]  #: (reader, peer, pieces)
CallLater = Callable[[float, Callable[[], None]], object]


class MemoryTransfer:
    """See ``base.Transfer``."""

    def __init__(self, peer: PeerInfo, pieces: Sequence[Piece], deadline: float) -> None:
        self.peer = peer
        self.pieces = tuple(pieces)
        self.deadline = deadline
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()
        self._over = threading.Event()

    @property
    def terminal(self) -> bool:
        return self._over.is_set()

    def end(self) -> None:
        self._over.set()

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class MemoryNetwork:
    """Connects the transports made on it. Peers can be frozen, thawed and killed. All methods are thread-safe."""

    def __init__(
        self,
        script: Script = lambda reader, peer, pieces: NO_FAULT,
        *,
        clock: Callable[[], float] = time.monotonic,
        call_later: CallLater | None = None,
    ) -> None:
        self.script = script
        self.clock = clock
        self.lock = threading.RLock()
        self._timer: _Timer | None = None
        if call_later is None:
            self._timer = _Timer()
            call_later = self._timer.call_later
        self.call_later = call_later
        self._alive: dict[str, MemoryTransport] = {}
        self._frozen: dict[str, list[Callable[[], None]]] = {}
        self._incoming: dict[str, set[MemoryTransfer]] = {}

    def freeze(self, agent: str) -> None:
        """The peer stops (SIGSTOP): what it should have sent is sent when it thaws."""
        with self.lock:
            self._frozen.setdefault(agent, [])

    def thaw(self, agent: str) -> None:
        with self.lock:
            for work in self._frozen.pop(agent, []):
                work()

    def kill(self, agent: str) -> None:
        """The peer dies: READs from it fail, and nothing of it is written any more."""
        with self.lock:
            self._alive.pop(agent, None)
            self._frozen.pop(agent, None)
            for transfer in self._incoming.pop(agent, set()):
                transfer.end()
                transfer.fail(TransferFailed(f"{agent} is dead"))

    def close(self) -> None:
        """Stop the real-time timer, if there is one."""
        if self._timer is not None:
            self._timer.close()

    # -- for transports -----------------------------------------------------------------------------------------

    def join(self, transport: MemoryTransport) -> None:
        with self.lock:
            if transport.info.agent in self._alive:
                raise ValueError(f"the agent name {transport.info.agent} is taken: names are never reused")
            self._alive[transport.info.agent] = transport

    def find(self, agent: str) -> MemoryTransport | None:
        return self._alive.get(agent)

    def begin(self, transfer: MemoryTransfer) -> None:
        self._incoming.setdefault(transfer.peer.agent, set()).add(transfer)

    def finish(self, transfer: MemoryTransfer) -> None:
        self._incoming.get(transfer.peer.agent, set()).discard(transfer)
        transfer.end()

    def when_awake(self, agent: str, work: Callable[[], None]) -> None:
        """Do what the peer does, now or when it thaws; never if it is dead."""
        if agent in self._frozen:
            self._frozen[agent].append(work)
        elif agent in self._alive:
            work()


class MemoryTransport:
    """See ``base.Transport``. ``host`` is given, so that two hosts can be played in one process."""

    def __init__(
        self, network: MemoryNetwork, worker_id: WorkerId, arena: torch.Tensor, layout: KVLayout, host: str = "host-0"
    ) -> None:
        """Raises ValueError if an agent of this name has been on the network and did not die."""
        self.bytes = arena.view(torch.uint8)
        self._network = network
        self._peers: dict[str, PeerInfo] = {}
        self._outgoing: set[MemoryTransfer] = set()
        self._closed = False
        self.info = PeerInfo(
            worker_id=worker_id,
            agent=worker_id,
            metadata=worker_id.encode(),
            base=arena.data_ptr(),
            nbytes=self.bytes.numel(),
            device="cpu",
            host=host,
            layout=layout,
        )
        network.join(self)

    def connect(self, peer: PeerInfo) -> None:
        """See ``Transport.connect``."""
        if difference := self.info.layout.difference(peer.layout):
            raise LayoutMismatch(f"{peer.worker_id} keeps other KV than this worker: {difference}")
        with self._network.lock:
            there = self._network.find(peer.agent)
            if self._closed or there is None or there.info != peer:
                raise TransferFailed(f"{peer.worker_id} cannot be reached")
            self._peers[peer.agent] = peer

    def disconnect(self, agent: str) -> None:
        """See ``Transport.disconnect``."""
        with self._network.lock:
            self._peers.pop(agent, None)

    def read(self, peer: PeerInfo, pieces: Sequence[Piece], deadline_s: float) -> MemoryTransfer:
        """See ``Transport.read``."""
        check_pieces(pieces, self.info.nbytes, peer.nbytes)
        network = self._network
        with network.lock:
            transfer = MemoryTransfer(peer, pieces, network.clock() + deadline_s)
            there = network.find(peer.agent)
            if self._closed or there is None or self._peers.get(peer.agent) != peer:
                self._peers.pop(peer.agent, None)
                transfer.end()
                transfer.fail(TransferFailed(f"{peer.worker_id} is not connected"))
                return transfer
            network.begin(transfer)
            self._outgoing.add(transfer)
            network.call_later(deadline_s, lambda: self._expire(transfer))
            fault = network.script(self.info, peer, transfer.pieces)
            if not fault.drop:
                self._deliver(transfer, there, fault)
            return transfer

    def checksum(self, offset: int, nbytes: int) -> bytes:
        """See ``Transport.checksum``."""
        return checksum(self.bytes, offset, nbytes)

    def attend(self, seconds: float) -> None:
        """See ``Transport.attend``: nothing is slow here."""

    def close(self) -> None:
        """See ``Transport.close``."""
        with self._network.lock:
            self._closed = True
            for transfer in list(self._outgoing):
                self._end(transfer)
                transfer.fail(TransferFailed("the transport was closed"))
            self._network.kill(self.info.agent)

    # -- one READ -----------------------------------------------------------------------------------------------

    def _deliver(self, transfer: MemoryTransfer, there: MemoryTransport, fault: Fault) -> None:
        network, agent = self._network, transfer.peer.agent

        def unless_over(work: Callable[[], None]) -> Callable[[], None]:
            return lambda: None if transfer.terminal else work()

        def at(delay_s: float, work: Callable[[], None]) -> None:
            def peer_works() -> None:
                with network.lock:
                    network.when_awake(agent, unless_over(work))

            if delay_s > 0:
                network.call_later(delay_s, peer_works)
            else:
                peer_works()

        def first_half() -> None:
            self._copy(transfer, there, 0, 1)
            if fault.error:
                self._end(transfer)
                self._peers.pop(agent, None)
                transfer.fail(TransferFailed(f"READ from {agent}: a scripted error"))

        def second_half() -> None:
            self._copy(transfer, there, 1, 2)
            if fault.corrupt:
                offset = transfer.pieces[-1].local_offset + transfer.pieces[-1].nbytes // 2
                self.bytes[offset] ^= 0x10
            if fault.duplicate_s is None:
                self._conclude(transfer)
            else:
                at(fault.duplicate_s, again)

        def again() -> None:
            self._copy(transfer, there, 0, 2)
            self._conclude(transfer)

        at(fault.delay_s / 2, first_half)
        at(fault.delay_s, second_half)  # after the first even if both are due now: timers keep their order

    def _copy(self, transfer: MemoryTransfer, there: MemoryTransport, start: int, stop: int) -> None:
        """Halves [start, stop) of 2 of every piece."""
        for piece in transfer.pieces:
            a, b = piece.nbytes * start // 2, piece.nbytes * stop // 2
            source = there.bytes[piece.remote_offset + a : piece.remote_offset + b]
            self.bytes[piece.local_offset + a : piece.local_offset + b] = source

    def _conclude(self, transfer: MemoryTransfer) -> None:
        self._end(transfer)
        if transfer.future.done():
            return
        if self._network.clock() > transfer.deadline:
            self._expire(transfer)
        else:
            transfer.future.set_result(None)

    def _expire(self, transfer: MemoryTransfer) -> None:
        nbytes = sum(piece.nbytes for piece in transfer.pieces)
        transfer.fail(TransferTimeout(f"{nbytes} bytes from {transfer.peer.worker_id} did not arrive in time"))

    def _end(self, transfer: MemoryTransfer) -> None:
        self._outgoing.discard(transfer)
        self._network.finish(transfer)


@dataclass(order=True, slots=True)
class _Due:
    at: float
    order: int
    work: Callable[[], None] = field(compare=False)


class _Timer:
    """Calls functions in time, on a thread of its own."""

    def __init__(self) -> None:
        self._due: list[_Due] = []
        self._order = itertools.count()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memory-network", daemon=True)
        self._thread.start()

    def call_later(self, delay_s: float, work: Callable[[], None]) -> None:
        with self._wake:
            heapq.heappush(self._due, _Due(time.monotonic() + delay_s, next(self._order), work))
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._closed:
                    return
                wait = self._due[0].at - time.monotonic() if self._due else None
                if wait is None or wait > 0:
                    self._wake.wait(wait)
                    continue
                due = heapq.heappop(self._due)
            due.work()
