"""A whole system in one event loop, with the bundled model, real NIXL and real ZeroMQ; workers that are to be killed
run in processes of their own.

``python pools.py ROLE NAME DIRECTORY SETTINGS``: one worker, until killed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlcache_dist.assembly import Site, TransportFactory, nixl_transport
from vlcache_dist.cache_directory.server import DirectoryServer
from vlcache_dist.config import Settings
from vlcache_dist.decode_workers.build import build_decode
from vlcache_dist.decode_workers.worker import DecodeWorker
from vlcache_dist.demo.pictures import Picture, draw
from vlcache_dist.encoder_workers.build import build_encoder
from vlcache_dist.encoder_workers.worker import EncoderWorker
from vlcache_dist.parallel.group import Launcher
from vlcache_dist.parallel.processes import Processes
from vlcache_dist.prefill_workers.build import build_prefill
from vlcache_dist.prefill_workers.worker import PrefillWorker
from vlcache_dist.prompt import parse_messages
from vlcache_dist.serve.build import build_frontend
from vlcache_dist.serve.chat import ChatEvent, ChatRequest, Delta, Done
from vlcache_dist.serve.frontend import Frontend
from vlcache_dist.types import SamplingParams

BUILD: dict[str, Callable[..., Any]] = {"encoder": build_encoder, "prefill": build_prefill, "decode": build_decode}
STORE_BYTES = KV_BYTES = 32 << 20
PATIENCE_S = 60.0

_ids = itertools.count(1)


@functools.cache
def picture(seed: int) -> Picture:
    """64 vision tokens."""
    return draw("form", seed=seed)


@dataclass(frozen=True)
class Answer:
    text: str
    done: Done

    @property
    def images(self) -> list[dict[str, Any]]:
        return self.done.vlcache["images"]

    @property
    def sources(self) -> list[str]:
        return [image["source"] for image in self.images]


def settings(**engine: Any) -> Settings:
    serve = engine.pop("serve", {})
    return Settings.read(
        model={"model": "tiny", "device": "cpu"},
        engine={"store_bytes": STORE_BYTES, "kv_bytes": KV_BYTES, "guard_budget": 0.0, **engine},
        serve=serve,
    )


class Process:
    """A worker in a process of its own."""

    def __init__(self, name: str, directory: str, own: Settings) -> None:
        role = name.partition("-")[0]
        command = [sys.executable, __file__, role, name, directory, own.model_dump_json()]
        self._process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Pools:
    """``async with Pools(encoders=1, prefills=2, decodes=1)``; ``processes`` name workers to run outside."""

    def __init__(
        self,
        *,
        encoders: int = 1,
        prefills: int = 2,
        decodes: int = 1,
        processes: Sequence[str] = (),
        transport: TransportFactory = nixl_transport,
        shards: Launcher | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings(**options)
        self._transport = transport
        self._shards = shards or Processes()
        self.directory = DirectoryServer(expiry_s=2.0)
        self._counts = {"encoder": encoders, "prefill": prefills, "decode": decodes}
        self._names = tuple(processes)
        self.processes: dict[str, Process] = {}
        self.encoders: list[EncoderWorker] = []
        self.prefills: list[PrefillWorker] = []
        self.decodes: list[DecodeWorker] = []
        self.frontend: Frontend
        self._address = ""

    async def __aenter__(self) -> Pools:
        torch.set_num_threads(1)
        self._address = await self.directory.start()
        for name in self._names:
            self.processes[name] = Process(name, self._address, self.settings)
        pools: dict[str, list[Any]] = {"encoder": self.encoders, "prefill": self.prefills, "decode": self.decodes}
        for role, count in self._counts.items():
            for number in range(count):
                pools[role].append(await self.start_worker(role, number))
        self.frontend = build_frontend(self.settings, self._site("ingress"))
        await self.frontend.start()
        expected = sum(self._counts.values()) + len(self._names)
        await self.until(lambda: len(self.frontend.node.members()) == expected)
        for worker in [*self.prefills, *self.decodes]:
            await self.until(lambda worker=worker: self._met(worker))
        return self

    async def __aexit__(self, *why: object) -> None:
        for process in self.processes.values():
            process.kill()
        if hasattr(self, "frontend"):
            await self.frontend.close()
        for worker in self.workers:
            await worker.close()
        await self.directory.close()

    async def start_worker(self, role: str, number: int, **engine: Any) -> Any:
        """One more, with these engine settings; the caller's to close unless it is put into a pool's list."""
        own = self.settings.model_copy(update={"engine": self.settings.engine.model_copy(update=engine)})
        site = self._site(f"{role}-{number}")
        worker = await asyncio.to_thread(BUILD[role], own, site, self._transport)
        await worker.start()
        return worker

    async def restart_directory(self) -> None:
        """At the same address, with nothing left of its state."""
        await self.directory.close()
        self.directory = DirectoryServer(expiry_s=2.0)
        await self.directory.start(int(self._address.rpartition(":")[2]))

    @property
    def workers(self) -> list[Any]:
        return [*self.encoders, *self.prefills, *self.decodes]

    def _met(self, worker: Any) -> bool:
        """It has found the way to all it may read from: start-up is over."""
        return bool(worker.node._links) and all(worker.node._links.values())

    def _site(self, name: str) -> Site:
        async def directory() -> Sequence[str]:
            return [self._address]

        return Site(name, "127.0.0.1", directory, self._shards)

    # -- asking -------------------------------------------------------------------------------------------------

    def request(self, *parts: str | Picture | bytes, **options: Any) -> ChatRequest:
        """``parts``: text, pictures or files, in order. Options of ``ChatRequest`` and ``SamplingParams``."""
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                data = part if isinstance(part, bytes) else part.png()
                url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
                content.append({"type": "image_url", "image_url": {"url": url}})
        sampling = {name: options.pop(name) for name in ("ignore_eos", "logprobs", "stop") if name in options}
        options.setdefault("max_tokens", 16)
        conversation = parse_messages([{"role": "user", "content": content}])
        return ChatRequest(f"r{next(_ids)}", conversation, SamplingParams(**sampling), **options)

    def events(self, *parts: str | Picture | bytes, **options: Any) -> AsyncGenerator[ChatEvent, None]:
        return self.frontend.chat(self.request(*parts, **options))

    async def ask(self, *parts: str | Picture | bytes, **options: Any) -> Answer:
        text = ""
        async with asyncio.timeout(PATIENCE_S):
            async for event in self.events(*parts, **options):
                if isinstance(event, Delta):
                    text += event.text
                else:
                    return Answer(text, event)
        raise AssertionError("the answer has no end")

    # -- what has happened --------------------------------------------------------------------------------------

    @property
    def encoded(self) -> int:
        return sum(encoder.num_encoded for encoder in self.encoders)

    @property
    def recorded(self) -> int:
        return sum(prefill.engine.stats().spans_recorded for prefill in self.prefills)

    @property
    def bytes_read(self) -> int:
        """By the prefill workers."""
        return sum(prefill.node._fetcher.bytes_read for prefill in self.prefills)

    @property
    def rows(self) -> int:
        """Tokens that went through layer 0 of the prefill workers."""
        return sum(prefill.engine.stats().layer_rows[0] for prefill in self.prefills)

    async def until(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            await asyncio.sleep(0.01)

    async def drained(self) -> None:
        """Until nothing is left of any request, anywhere; then every book must add up."""
        problems: list[str] = []

        def empty() -> bool:
            problems[:] = [problem for worker in self.workers for problem in _left(worker)]
            if self.frontend._media:
                problems.append(f"media of {list(self.frontend._media)}")
            if self.directory.state.stats()["claims"]:
                problems.append(f"claims: {self.directory.state._claims}")
            if self.directory._waiters:
                problems.append(f"waiters: {list(self.directory._waiters)}")
            return not problems

        with contextlib.suppress(AssertionError):
            await self.until(empty)
        assert not problems, "\n".join(problems)
        self.directory.state.validate()
        for worker in self.workers:
            worker.node.store.validate()
            if hasattr(worker, "engine"):
                await worker._bridge.call(lambda engine: engine.validate())


def _left(worker: Any) -> list[str]:
    name, stats = worker.node.name, worker.node.store.stats()
    problems = [
        f"{name}: {what} = {getattr(stats, what)}"
        for what in ("filling", "pinned", "leased", "quarantined", "num_leases")
        if getattr(stats, what)
    ]
    if isinstance(worker, EncoderWorker):
        return problems + ([f"{name}: pictures on their way"] if worker._tasks else [])
    engine = worker.engine.stats()
    for what in ("waiting", "running", "parked"):
        if getattr(engine, what):
            problems.append(f"{name}: {getattr(engine, what)} {what}")
    if engine.blocks_free != engine.blocks_total:
        problems.append(f"{name}: {engine.blocks_total - engine.blocks_free} blocks in use")
    if worker._bridge._queues:
        problems.append(f"{name}: event queues of {list(worker._bridge._queues)}")
    if isinstance(worker, PrefillWorker):
        if worker._parked or worker._resolvers or len(worker._production):
            problems.append(f"{name}: {worker._parked} {worker._resolvers} {len(worker._production)} in production")
    return problems


async def _run(role: str, name: str, directory: str, own: Settings) -> None:
    async def resolve() -> Sequence[str]:
        return [directory]

    worker = BUILD[role](own, Site(name, "127.0.0.1", resolve))
    await worker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    asyncio.run(_run(sys.argv[1], sys.argv[2], sys.argv[3], Settings.of(**json.loads(sys.argv[4]))))
