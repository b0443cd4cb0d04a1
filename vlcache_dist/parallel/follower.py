"""A follower: one rank above 0 of a tensor-parallel worker. It holds a shard of the model, of the pages and of the
arena, and does what the leader's runner does, in the same order.

``python -m vlcache_dist.parallel.follower`` reads an ``Invitation`` (JSON) from stdin and runs until its leader ends.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from vlcache_dist.engine.runner import Runner
from vlcache_dist.engine.streaming import LayeredPass, Streamer
from vlcache_dist.errors import CheckpointError, VLCacheError
from vlcache_dist.kv.arena import TORCH_DTYPES, Arena, allocate_pages, free_bytes
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.model.parallel import LanguageShard, Shard, load_shard
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.parallel import protocol as p
from vlcache_dist.parallel.collective import Collective, join_store
from vlcache_dist.parallel.link import Invitation, Link, LinkClosed, enter
from vlcache_dist.parallel.side import FollowerSide
from vlcache_dist.transfer.base import Transport
from vlcache_dist.types import ObjectKind

MakeTransport = Callable[[str, torch.Tensor, KVLayout], Transport]
GRACE_S = 2.0
LoadShard = Callable[[p.Load, Shard, Collective, torch.device, KVLayout], LanguageShard]


def follow(
    invitation: Invitation,
    make_transport: MakeTransport,
    load: LoadShard | None = None,
    on_leader_lost: Callable[[], None] = lambda: None,
) -> None:
    """Serve until the leader closes the links, or is gone. What goes wrong is told to the leader and then raised.

    ``on_leader_lost`` is called, from another thread, when the leader is gone: a rank that waits for it inside a
    collective does not come back by itself."""
    steps = enter(invitation, p.COMMANDS, side=False)
    try:
        link = enter(invitation, p.SIDE_COMMANDS, side=True)
        side = FollowerSide(link, on_leader_lost)
        side.start()
        try:
            follower = _Follower(invitation, steps, side, make_transport, load or from_checkpoint)
            try:
                follower.run()
            finally:
                follower.close()
        finally:
            side.close()
    finally:
        steps.close()


def from_checkpoint(
    command: p.Load, shard: Shard, collective: Collective, device: torch.device, layout: KVLayout
) -> LanguageShard:
    """The shard's weights, read from the leader's checkpoint. Raises CheckpointError if it is another one here."""
    checkpoint = Checkpoint.open(command.folder)
    if checkpoint.fingerprint != layout.model:
        raise CheckpointError(f"{checkpoint.folder} holds other weights than the leader's checkpoint")
    return load_shard(checkpoint, shard, collective.all_reduce, device, TORCH_DTYPES[layout.dtype])


class _Follower:
    """The steps link's receiver."""

    def __init__(
        self, invitation: Invitation, steps: Link, side: FollowerSide, make_transport: MakeTransport, load: LoadShard
    ) -> None:
        self._invitation = invitation
        self._rank = invitation.rank
        self._steps = steps
        self._side = side
        self._make_transport = make_transport
        self._load_shard = load
        self._collective: Collective | None = None
        self._model: LanguageShard | None = None
        self._arena: Arena
        self._runner: Runner
        self._streamer: Streamer
        self._layers: LayeredPass

    def run(self) -> None:
        try:
            while True:
                reply = self._do(self._steps.receive())
                if reply is not None:
                    self._steps.send(reply)
        except LinkClosed:
            return
        except Exception as error:
            code = error.code if isinstance(error, VLCacheError) else "EngineError"
            text = str(error) if isinstance(error, VLCacheError) else f"{type(error).__name__}: {error}"
            self._steps.send(p.Failed(code, f"rank {self._rank}: {text}"))
            self._side.last_word(f"rank {self._rank}: {text}")
            raise

    def close(self) -> None:
        """Leave the collectives, and before that the graphs that captured some."""
        self.__dict__.pop("_runner", None)
        if self._collective is not None:
            self._collective.abort()

    def _do(self, command: Any) -> p.Reply | None:
        match command:
            case p.Launch():
                self._runner.launch(command.step, (), ())
            case p.Expect():
                self._runner.expect(command.traffic)
            case p.Prepare():
                self._runner.prepare()
            case p.PrepareLayers():
                self._streamer.prepare()
            case p.BeginLayers():
                self._layers = self._streamer.begin(command.step, command.edges)
            case p.RunLayers():
                self._layers.run(command.start, command.stop)
            case p.Erase():
                self._streamer.erase(command.slots)
            case p.Scatter():
                self._runner.scatter(command.src, command.span_tokens, command.slots, command.positions)
            case p.Pack():
                self._runner.pack(command.slots, _staging(command.offset, command.elements))
            case p.Unpack():
                self._runner.unpack(_staging(command.offset, command.elements), command.slots)
            case p.Compare():
                self._meeting().all_reduce(self._runner.compare(command.extents, command.probes, command.slots))
            case p.Reread():
                _, paid = self._runner.reread(command.step, command.layer, command.slots)
                self._meeting().all_reduce(paid)
            case p.Lend():
                target = _staging(command.offset, command.elements)
                self._runner.lend(command.extent, command.probes, command.slots, command.positions, target)
            case p.StoreEmbeddings():
                elements = self._arena.layout.embedding_elements(command.rows)
                self._meeting().broadcast(self._arena.tensor[command.offset : command.offset + elements])
            case p.Synchronize():
                self._runner.synchronize()
                return p.Ok()
            case p.Open():
                return self._open(command)
            case p.Load():
                return self._load(command)
            case p.Allocate():
                self._allocate(command)
                return p.Ok()
        return None

    def _meeting(self) -> Collective:
        assert self._collective is not None
        return self._collective

    def _open(self, command: p.Open) -> p.Opened:
        layout = msgspec.structs.replace(command.layout, tp_rank=self._rank)
        self._device = torch.device(command.devices[self._rank - 1])
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._arena = Arena(layout, command.arena_elements, self._device)
        if not command.worker_id:
            return p.Opened(None)
        transport = self._make_transport(f"{command.worker_id}/{self._rank}", self._arena.tensor, layout)
        self._side.serve(transport, self._arena.tensor)
        return p.Opened(transport.info)

    def _load(self, command: p.Load) -> p.Loaded:
        layout = self._arena.layout
        store = join_store(self._invitation.host, command.store_port)
        self._collective = Collective(store, self._invitation.host, self._rank, layout.tp_size, self._device)
        shard = Shard(self._rank, layout.tp_size)
        self._model = self._load_shard(command, shard, self._collective, self._device, layout)
        return p.Loaded(free_bytes(self._device))

    def _allocate(self, command: p.Allocate) -> None:
        assert self._model is not None
        pages = allocate_pages(self._arena.layout, command.num_blocks, command.block_size, self._device)
        self._runner = Runner(self._model, pages, self._arena, graphs=command.graphs)
        self._streamer = Streamer(self._runner, graphs=command.graphs)


def _staging(offset: int, elements: int) -> Extent:
    return Extent(0, ObjectKind.STAGING, b"", b"", offset, elements)


def main() -> None:
    """The process around a follower."""
    from vlcache_dist.assembly import nixl_transport

    invitation = msgspec.json.decode(sys.stdin.readline(), type=Invitation)
    torch.set_num_threads(int(os.environ.get("VLCACHE_CPU_THREADS", "1")))
    follow(invitation, nixl_transport, on_leader_lost=leave_soon)


def leave_soon() -> None:
    """End this process, whatever its main thread waits for, after it has had time to end by itself."""
    timer = threading.Timer(GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
