"""The vision-encoder worker: pictures in, encoder output in its store, announced and readable by any prefill worker.

Plain Python over a ``Node``; the Ray actor around it is in ``actor.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from vlcache_dist import wire
from vlcache_dist.encoder_workers.scheduler import EncodeJob, EncodeScheduler
from vlcache_dist.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidMedia,
    Overloaded,
    ProtocolError,
    VLCacheError,
    WorkerLost,
)
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.media import MediaItem, MediaProcessor, Patches
from vlcache_dist.model.graph_policy import GraphReport
from vlcache_dist.node import Node
from vlcache_dist.rpc import Call
from vlcache_dist.types import ContentKey, MediaSpan, ObjectKind

log = logging.getLogger(__name__)
IDLE_SHARE = 0.05  #: of the time that may be used when nobody waits: who comes meanwhile does wait
T = TypeVar("T")


class Tower(Protocol):
    """What the worker needs of a vision tower; one thread at a time."""

    def forward(self, patches: torch.Tensor, grids: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """patches [N, C*T*P*P] of all pictures, packed, and their grids -> embeddings [tokens, hidden]."""
        ...

    def warm_up(self, graph_s: float) -> None:
        """What happens once happens now; capturing graphs may take ``graph_s`` seconds."""
        ...

    def prepare(self) -> bool:
        """Use the time in which nobody waits; False if there is nothing to do with it."""
        ...

    def graph_report(self) -> GraphReport | None: ...


@dataclass(slots=True)
class _Task:
    """One picture on its way. ``result`` is shared by all who asked for it."""

    span: MediaSpan
    private: bool
    offers: list[tuple[wire.Encode, list[bytes]]] = field(default_factory=list)  # who can give the bytes
    patches: Patches | None = None
    result: asyncio.Future[Extent] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    waiters: int = 0


class EncoderWorker:
    """Owns the vision tower. Encoding is single flight per content key; a picture that fails, fails alone.

    ``graph_start_s``: see ``config``. ``max_patches`` bounds one forward pass, ``max_waiting_tokens`` the queue (above
    it: Overloaded).
    """

    def __init__(
        self,
        node: Node,
        tower: Tower,
        processor: MediaProcessor,
        *,
        graph_start_s: float = 0.0,
        max_patches: int = 16_384,
        max_waiting_tokens: int = 262_144,
    ) -> None:
        self.node = node
        self._tower = tower
        self._processor = processor
        self._graph_start_s = graph_start_s
        self._scheduler = EncodeScheduler(max_patches)
        self._max_waiting_tokens = max_waiting_tokens
        self._tasks: dict[ContentKey, _Task] = {}
        self._wake = asyncio.Event()
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode-media")
        self._device = ThreadPoolExecutor(1, thread_name_prefix="vision-tower")
        self._crashed: Exception | None = None
        self.num_encoded = 0
        self.encoded_tokens = 0
        self.busy_s = 0.0
        node.handle(wire.Encode, self.encode)
        node.on_load(self.load)
        node.on_status(self.status)
        node.on_health(lambda: self._crashed is None)

    async def start(self) -> None:
        await self._in_device(self._tower.warm_up, self._graph_start_s)
        await self.node.start()
        self.node.spawn(self._encode_forever())

    async def close(self) -> None:
        await self.node.close()
        self._device.shutdown(wait=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def load(self) -> wire.WorkerLoad:
        return wire.WorkerLoad(
            running=len(self._tasks) - len(self._scheduler),
            waiting=len(self._scheduler),
            waiting_tokens=self._scheduler.waiting_tokens,
            token_s=self.busy_s / self.encoded_tokens if self.encoded_tokens else 0.0,
        )

    def status(self) -> dict[str, object]:
        graphs = self._tower.graph_report()
        return {
            "encoded_items": self.num_encoded,
            "encoded_tokens": self.encoded_tokens,
            "busy_s": self.busy_s,
            "graphs": None if graphs is None else asdict(graphs),
        }

    async def encode(self, message: wire.Encode, call: Call) -> wire.Encoded:
        """Handler of ``wire.Encode``: answers when the encoder output is committed here."""
        key = message.span.key
        if self._crashed is not None:
            raise WorkerLost(f"this encoder has stopped: {self._crashed}")
        if (extent := self.node.store.lookup(ObjectKind.EMBEDDING, key)) is not None:
            return wire.Encoded(self.node.holder_of(extent), computed=False)
        task = self._tasks.get(key)
        computed = task is None
        if task is None:
            waiting = sum(other.span.length for other in self._tasks.values())
            if waiting > self._max_waiting_tokens:
                raise Overloaded(f"{waiting} vision tokens wait for the encoder")
            task = self._tasks[key] = _Task(message.span, message.private)
            self.node.spawn(self._prepare(task))
        task.waiters += 1
        task.offers.append((message, call.attachments))
        try:
            async with asyncio.timeout(message.timeout_s):
                extent = await asyncio.shield(task.result)
        except TimeoutError:
            raise DeadlineExceeded(f"encoding took longer than {message.timeout_s:.1f} s") from None
        finally:
            task.waiters -= 1
            if task.waiters == 0 and self._scheduler.cancel(key):
                self._finish(task, None)  # nobody waits and it has not started: forget it
        return wire.Encoded(self.node.holder_of(extent), computed)

    async def _prepare(self, task: _Task) -> None:
        """Get the bytes, decode them off the loop, queue the picture."""
        span = task.span
        try:
            files = await self._bytes(task)
            item = MediaItem.of(span.modality, tuple(files), where=f"item {span.index}")
            loop = asyncio.get_running_loop()
            patches = await loop.run_in_executor(self._decoders, self._processor.patches, item)
            if patches.grid != tuple(span.grid):
                raise InvalidMedia(f"item {span.index}: its grid is {patches.grid}, its header promised {span.grid}")
        except VLCacheError as error:
            self._finish(task, error)
            return
        except Exception as error:
            log.exception("decoding item %d failed", span.index)
            self._finish(task, InvalidMedia(f"item {span.index} cannot be decoded: {type(error).__name__}: {error}"))
            return
        task.offers.clear()
        if task.waiters == 0:
            self._finish(task, None)
            return
        task.patches = patches
        self._scheduler.add(EncodeJob(span.key, len(patches.values), span.length))
        self._wake.set()

    async def _bytes(self, task: _Task) -> Sequence[bytes]:
        """From any of those who want the picture: the first to ask may be gone before its bytes were fetched."""
        failure: VLCacheError | None = None
        while task.offers:
            message, attached = task.offers.pop(0)
            try:
                return attached or await self._pull(message)
            except VLCacheError as error:
                failure = error
        raise failure or ProtocolError("nobody offers the picture's bytes")

    async def _pull(self, message: wire.Encode) -> Sequence[bytes]:
        source = message.source
        reply, files = await self.node.client.call_with_attachments(
            source.address, wire.GetMedia(source.request_id, message.span.index), timeout_s=message.timeout_s
        )
        if not isinstance(reply, wire.MediaReply) or reply.frames != len(files):
            raise ProtocolError(f"the ingress promised other frames than the {len(files)} it sent")
        return files

    async def _encode_forever(self) -> None:
        try:
            while True:
                while not self._wake.is_set():
                    started = time.perf_counter()
                    more = await self._in_device(self._tower.prepare)
                    pause = (time.perf_counter() - started) * (1 / IDLE_SHARE - 1)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), pause if more else None)
                self._wake.clear()
                while batch := self._scheduler.next_batch():
                    await self._encode_batch([self._tasks[job.key] for job in batch])
        except Exception as error:
            self._crashed = error
            for task in list(self._tasks.values()):
                self._finish(task, WorkerLost(f"this encoder has stopped: {error}"))
            raise

    async def _encode_batch(self, tasks: list[_Task]) -> None:
        """One forward pass; if it fails with several pictures, each is tried alone."""
        started = time.perf_counter()
        try:
            extents = await self._in_device(self._run, tasks)
        except Exception as error:
            if len(tasks) > 1:
                log.warning("a batch of %d pictures failed (%s); trying them one by one", len(tasks), error)
                for task in tasks:
                    await self._encode_batch([task])
                return
            log.exception("encoding %s failed", tasks[0].span.key.hex()[:16])
            known = isinstance(error, VLCacheError)
            self._finish(tasks[0], error if known else EngineError(f"encoding failed: {type(error).__name__}: {error}"))
            return
        finally:
            self.busy_s += time.perf_counter() - started
        for task, extent in zip(tasks, extents, strict=True):
            self.num_encoded += 1
            self.encoded_tokens += task.span.length
            self.node.announce(extent)
            self._finish(task, None, extent)

    async def _in_device(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function`` of ``arguments`` in the tower's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._device, function, *arguments)

    def _run(self, tasks: list[_Task]) -> list[Extent]:
        """In the tower's thread: forward pass, then into the store."""
        patches = [task.patches for task in tasks if task.patches is not None]
        packed = torch.cat([torch.from_numpy(p.values) for p in patches])
        out = self._tower.forward(packed, [p.grid for p in patches])
        extents: list[Extent] = []
        row = 0
        for task in tasks:
            rows = out[row : row + task.span.length]
            row += task.span.length
            extents.append(self.node.put(ObjectKind.EMBEDDING, task.span, rows, private=task.private))
        return extents

    def _finish(self, task: _Task, error: BaseException | None, extent: Extent | None = None) -> None:
        if self._tasks.get(task.span.key) is task:
            del self._tasks[task.span.key]
        if task.result.done():
            return
        if extent is not None:
            task.result.set_result(extent)
        elif error is not None:
            task.result.set_exception(error)
            if task.waiters == 0:
                task.result.exception()  # retrieved: nobody is left to hear it
        else:
            task.result.cancel()
