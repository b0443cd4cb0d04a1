"""Time to first token when the image's KV lies on another GPU: a prefill worker as the system runs it, with random
weights, that holds images or reads them from another one.

Clocks. *Local* and *remote* warm requests go the same way: the directory is asked, as the ingress does for every
request, and ``PrefillWorker.prefill`` is told what it said; from a tokenized prompt to the first token on the event
loop, admission, resolving and all thread hops included. Local: KV and encoder output are in the own store. Remote:
neither is; leases are taken, KV and the recomputed rows' encoder output are read from the other worker. Every request
has a text of its own. *Fetch*: one image's KV from lease to admission,
without computing on it. The trace of a remote request says when each group of layers landed (host clock) and when it
was computed (CUDA events on the same scale): *hidden* is the share of the time from the first READ to the last landing
in which the GPU computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from vlcache_dist import wire
from vlcache_dist.assembly import nixl_transport
from vlcache_dist.bench.shapes import model_config, random_models
from vlcache_dist.config import EngineSettings
from vlcache_dist.engine.api import EngineStats
from vlcache_dist.engine.build import build_engine, build_store, kv_layout
from vlcache_dist.engine.engine import Engine
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.node import Node
from vlcache_dist.prefill_workers.worker import PrefillWorker
from vlcache_dist.rpc import Call
from vlcache_dist.transfer.fetch import FetchLimits
from vlcache_dist.types import KVSource, MediaSpan, ObjectKind, ReuseMode, Role, SamplingParams

log = logging.getLogger(__name__)
T = TypeVar("T")
TEXT_TOKENS = 64
WARM_UP = 4
ATTEMPTS = 4
TIMEOUT_S = 120.0
NO_MEDIA = wire.MediaSource("tcp://127.0.0.1:9", "nobody")


class Elsewhere(Exception):
    """A request's KV did not come from where it should."""


class BenchWorker:
    """One prefill worker on one device. ``streaming`` False: KV is read whole before it is computed on."""

    def __init__(self, name: str, shape: str, device: str, max_vision_tokens: int, layers: int | None = None) -> None:
        cuda = device == "cuda"
        self.device = torch.device("cuda:0" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        dtype = "bfloat16" if cuda else "float32"
        self.config = model_config(shape, layers)
        self.layout = kv_layout(self.config, f"random {shape}", dtype)
        token_bytes = (self.layout.kv_token + self.layout.hidden) * self.layout.itemsize
        self._settings = EngineSettings(
            store_bytes=4 * max_vision_tokens * token_bytes + (256 << 20 if cuda else 8 << 20),
            kv_bytes=(max_vision_tokens + 4096) * self.layout.kv_token * self.layout.itemsize,
            max_batch_tokens=max_vision_tokens + 4096,
        )
        self._name = name
        self._language = random_models(self.config, self.device, getattr(torch, dtype))[0]
        self._rng = np.random.default_rng(sum(name.encode()))
        self._requests = self._elsewhere = 0
        self._limit = max(self.config.text.max_position_embeddings, max_vision_tokens + 2048)

    async def start(self, directory: str, limits: dict[str, Any]) -> str:
        """Join the directory; returns the worker id."""

        async def addresses() -> Sequence[str]:
            return [directory]

        arena, store = build_store(self.layout, self._settings, self.device)
        node = Node(
            name=self._name,
            role=Role.COLOCATED,
            host="127.0.0.1",
            directory=addresses,
            arena=arena,
            store=store,
            make_transport=lambda worker_id: nixl_transport(worker_id, arena.tensor, self.layout),
            limits=FetchLimits(**limits),
        )
        engine = build_engine(self._language, self.config, self._settings, arena, store, max_model_len=self._limit)
        self.worker = PrefillWorker(node, engine)
        await self.worker.start()
        return node.worker_id

    async def close(self) -> None:
        await self.worker.close()

    async def met(self, worker_id: str) -> dict[str, Any]:
        """Wait until the link to a worker is measured; its report."""
        node = self.worker.node
        while node._links.get(worker_id) is None:  # noqa: ASYNC110 - the node tells nobody
            await asyncio.sleep(0.05)
        link = node._links[worker_id]
        assert link is not None
        return {
            "read_gbps": link.bytes_per_s / 1e9,
            "latency_us": link.latency_s * 1e6,
            "group_bytes": link.group_bytes,
            "curve": [{"bytes": nbytes, "us": seconds * 1e6} for nbytes, seconds in link.points],
        }

    # -- the holder ---------------------------------------------------------------------------------------------

    async def record(self, key: bytes, tokens: int) -> None:
        """Put random encoder output of a square picture of ``tokens`` tokens into the store, compute its KV, announce
        both."""
        span = _span(key, tokens, 0)
        rows = torch.randn(tokens, self.layout.hidden, device=self.device, dtype=torch.float32)
        self.worker.node.announce(self.worker.node.put(ObjectKind.EMBEDDING, span, rows))
        await self._first_token(span, "none", KVSource.COMPUTED)

    # -- the reader ---------------------------------------------------------------------------------------------

    async def measure(self, key: bytes, tokens: int, plan: str, runs: int) -> dict[str, Any]:
        """Milliseconds of local and remote warm requests and of fetches: medians, minima, all values."""
        span = _span(key, tokens, 0)
        for kind in (ObjectKind.KV, ObjectKind.EMBEDDING):
            while not await self.worker.node.holders(kind, key):  # noqa: ASYNC110 - the announcement is on its way
                await asyncio.sleep(0.01)
        self._elsewhere = 0
        remote = await self._repeat(span, plan, KVSource.REMOTE, runs)
        trace, streamed = await self._until_there(lambda: self._traced_alone(span, plan))
        fetch = [await self._fetch_ms(span) for _ in range(WARM_UP + runs)][WARM_UP:]
        await self._bring(span)
        local = await self._repeat(span, plan, KVSource.LOCAL, runs)
        self._drop(key)
        again = await self._repeat(span, plan, KVSource.REMOTE, runs)
        return {
            "vision_tokens": tokens,
            "kv_bytes": self.layout.kv_elements(tokens) * self.layout.itemsize,
            "local_ms": statistics.median(local),
            "remote_ms": statistics.median(remote + again),
            "ratio": statistics.median(remote + again) / statistics.median(local),
            "fetch_ms": statistics.median(fetch),
            "fetch_min_ms": min(fetch),
            "streamed": streamed,
            "hidden": hidden_share(trace),
            "trace": trace,
            "fell_back": self._elsewhere,
            "all": {"local_ms": local, "remote_ms": remote + again, "fetch_ms": fetch},
        }

    async def same_token(self, key: bytes, tokens: int, plan: str) -> bool:
        """The same request twice, from the holder's KV as it arrives and from the own copy: the same tokens?"""
        return await self._until_there(lambda: self._same_token(_span(key, tokens, 0), plan))

    async def _same_token(self, span: MediaSpan, plan: str) -> bool:
        answers = []
        for source in (KVSource.REMOTE, KVSource.LOCAL):
            if source is KVSource.REMOTE:
                self._drop(span.key)
            self.worker.engine.pool.drop_contents()
            self._rng = np.random.default_rng(1)
            answers.append((await self._first_token(span, plan, source))[0])
            if source is KVSource.REMOTE:
                await self._bring(span)
        self._drop(span.key)
        return answers[0] == answers[1]

    async def _repeat(self, span: MediaSpan, plan: str, source: KVSource, runs: int) -> list[float]:
        async def once() -> float:
            if source is KVSource.REMOTE:
                self._drop(span.key)
            return (await self._first_token(span, plan, source))[1]

        took: list[float] = []
        for _ in range(WARM_UP + runs):
            took.append(await self._until_there(once))
            if len(took) <= WARM_UP:
                await self.worker._bridge.call(_use_idle_time)
            await asyncio.sleep(0.002)
        return took[WARM_UP:]

    async def _until_there(self, measure: Callable[[], Awaitable[T]]) -> T:
        """``measure``, again if the KV did not come from where it should (a deadline was missed: it is one of the
        things that happen on a busy machine). How often is reported. Raises Elsewhere if it never does."""
        for _ in range(ATTEMPTS - 1):
            try:
                return await measure()
            except Elsewhere as error:
                log.warning("%s: measured again", error)
                self._elsewhere += 1
        return await measure()

    async def _fetch_ms(self, span: MediaSpan) -> float:
        self._drop(span.key)
        started = time.perf_counter()
        extent = await self._fetch(span, ObjectKind.KV)
        took = (time.perf_counter() - started) * 1e3
        self.worker.node.store.unpin(extent)
        return took

    async def _bring(self, span: MediaSpan) -> None:
        for kind in (ObjectKind.KV, ObjectKind.EMBEDDING):
            if self.worker.node.store.lookup(kind, span.key) is None:
                self.worker.node.store.unpin(await self._fetch(span, kind))

    async def _fetch(self, span: MediaSpan, kind: ObjectKind) -> Extent:
        node = self.worker.node
        holders = [h for h in await node.holders(kind, span.key) if h.worker_id != node.worker_id]
        return await node.fetch(holders[0], kind, span)

    def _drop(self, key: bytes) -> None:
        store = self.worker.node.store
        for extent in store.objects():
            if extent.key == key:
                store.discard(extent)

    async def _first_token(self, span: MediaSpan, plan: str, source: KVSource) -> tuple[int, float]:
        return await self._ask(self._prompt(span, plan), source)

    def _prompt(self, span: MediaSpan, plan: str) -> wire.Generation:
        """A request with a text of its own."""
        self._requests += 1
        text = self._rng.integers(1, min(self.config.image_token_id, 800), TEXT_TOKENS).tolist()
        half = TEXT_TOKENS // 2
        tokens = (*text[:half], *(self.config.image_token_id for _ in range(span.length)), *text[half:])
        return wire.Generation(
            request_id=f"{self._name}-{self._requests}",
            tenant="",
            token_ids=tokens,
            spans=(msgspec.structs.replace(span, start=half),),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True),
            reuse=ReuseMode.APPROX,
            plan=plan,
        )

    async def _ask(self, generation: wire.Generation, source: KVSource) -> tuple[int, float]:
        """Run one request: its first token and the milliseconds until then. Raises Elsewhere if its KV is not from
        ``source``."""
        started = time.perf_counter()
        states = await self.worker.node.lookup([span.key for span in generation.spans])
        message = wire.Prefill(generation, NO_MEDIA, TIMEOUT_S, tuple(states))
        async with contextlib.aclosing(
            self.worker.prefill(message, _no_call())  # type: ignore[type-var]
        ) as replies:
            reply = await anext(replies)
            took = (time.perf_counter() - started) * 1e3
        assert isinstance(reply, wire.Prefilled)
        if reply.reports[0].source is not source:
            raise Elsewhere(f"KV came from {reply.reports[0].source}, not {source}")
        return reply.token_id, took

    async def _traced_alone(self, span: MediaSpan, plan: str) -> tuple[dict[str, Any], bool]:
        """``_traced``, and whether that request was computed while its KV arrived."""
        before: EngineStats = self.worker.engine.stats()
        trace = await self._traced(span, plan)
        after: EngineStats = self.worker.engine.stats()
        return trace, after.spans_streamed > before.spans_streamed

    # -- what overlaps with what ----------------------------------------------------------------------------------

    async def _traced(self, span: MediaSpan, plan: str) -> dict[str, Any]:
        """One remote request with its landings and computed groups, in ms from the request's start."""
        reader, streamer = self.worker.node._fetcher._reader, self.worker.engine._streamer
        read, begin = reader.read, streamer.begin
        client, bridge = self.worker.node.client, self.worker._bridge
        call, deliver = client.call, bridge._deliver
        steps: list[tuple[str, float, float]] = []
        landings: list[tuple[float, float]] = []
        clock = _DeviceClock(self.device)

        async def noted_read(peer: Any, extent: Extent, pieces: Any, deadlines: Any, landed: Any = None) -> None:
            posted = time.perf_counter()

            def note(index: int) -> None:
                if extent.kind is ObjectKind.KV:
                    landings.append((posted, time.perf_counter()))
                if landed is not None:
                    landed(index)

            await read(peer, extent, pieces, deadlines, note)

        async def noted_call(address: str, message: Any, **options: Any) -> Any:
            asked = time.perf_counter()
            reply = await call(address, message, **options)
            steps.append((type(message).__name__, asked, time.perf_counter()))
            return reply

        def noted_event(event: Any) -> None:
            steps.append((type(event).__name__, time.perf_counter(), time.perf_counter()))
            deliver(event)

        def noted_begin(step: Any, edges: tuple[int, ...]) -> Any:
            asked = time.perf_counter()
            own = begin(step, edges)
            steps.append(("inputs sent", asked, time.perf_counter()))
            return _NotedPass(own, clock)

        self._drop(span.key)
        reader.read = noted_read  # type: ignore[method-assign]
        streamer.begin = noted_begin  # type: ignore[method-assign]
        client.call = self.worker.node._fetcher._call = noted_call  # type: ignore[method-assign]
        bridge._deliver = noted_event  # type: ignore[method-assign]
        try:
            generation = self._prompt(span, plan)
            started = clock.start()
            _, took = await self._ask(generation, KVSource.REMOTE)
        finally:
            reader.read, streamer.begin = read, begin  # type: ignore[method-assign]
            client.call = self.worker.node._fetcher._call = call  # type: ignore[method-assign]
            bridge._deliver = deliver  # type: ignore[method-assign]
        return {
            "landings_ms": [[(a - started) * 1e3, (b - started) * 1e3] for a, b in landings],
            "steps_ms": [[name, (a - started) * 1e3, (b - started) * 1e3] for name, a, b in steps],
            "computed_ms": clock.intervals_ms(),
            "token_ms": took,
        }


class _DeviceClock:
    """Times of device work on the host's scale."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._base: Any = None

    def start(self) -> float:
        """Both clocks' zero."""
        if self._cuda:
            torch.cuda.synchronize()
        self._base = self.mark()
        if self._cuda:
            self._base.synchronize()
        self._zero = time.perf_counter()
        return self._zero

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, start: Any, stop: Any) -> None:
        self._marks.append((start, stop))

    def intervals_ms(self) -> list[list[float]]:
        if not self._cuda:
            return [[(a - self._zero) * 1e3, (b - self._zero) * 1e3] for a, b in self._marks]
        torch.cuda.synchronize()
        return [[self._base.elapsed_time(a), self._base.elapsed_time(b)] for a, b in self._marks]


class _NotedPass:
    """A layered pass that marks what it does."""

    def __init__(self, own: Any, clock: _DeviceClock) -> None:
        self._own, self._clock = own, clock

    def run(self, start: int, stop: int) -> None:
        before = self._clock.mark()
        self._own.run(start, stop)
        self._clock.note(before, self._clock.mark())

    def finish(self, *arguments: Any) -> Any:
        return self._own.finish(*arguments)


def hidden_share(trace: dict[str, Any]) -> float | None:
    """Of the time from the first READ to the last landing, the share in which groups were computed; None if nothing
    was streamed."""
    if not trace["landings_ms"] or not trace["computed_ms"]:
        return None
    start, stop = trace["landings_ms"][0][0], trace["landings_ms"][-1][1]
    computed, cursor = 0.0, start
    for a, b in sorted(trace["computed_ms"]):
        a, b = max(a, cursor), min(b, stop)
        if a < b:
            computed += b - a
            cursor = b
    return float(computed / (stop - start))


def _span(key: bytes, tokens: int, start: int) -> MediaSpan:
    side = max(2, round(tokens**0.5 / 4) * 4)
    return MediaSpan(key, start, side * side, (1, 2 * side, 2 * side))


def _use_idle_time(engine: Engine) -> None:
    """Capture what would be captured while nobody waits."""
    while engine.idle():
        pass


def _no_call() -> Call:
    """``PrefillWorker.prefill`` does not look at it."""
    return None  # type: ignore[return-value]


def report_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the traces, for the terminal."""
    return [{k: v for k, v in row.items() if k not in ("trace", "all")} for row in rows]


def write_picture(trace: dict[str, Any], file: Path, title: str) -> None:
    """When groups of layers landed and when they were computed, as SVG."""
    landings = [(a, b) for a, b in trace["landings_ms"]]
    starts = [landings[0][0], *(b for _, b in landings[:-1])]
    bars = [("KV arrives", "#1f77b4", [(a, b) for a, (_, b) in zip(starts, landings, strict=True)])]
    bars.append(("layers computed", "#ff7f0e", [(a, b) for a, b in trace["computed_ms"]]))
    end = max(trace["token_ms"], *(b for _, _, parts in bars for _, b in parts))
    left, width, row = 120, 760, 44

    def x(ms: float) -> float:
        return round(left + width * ms / end, 1)

    body = [f'<text x="{left}" y="20" font-weight="bold">{title}</text>']
    for number, (name, color, parts) in enumerate(bars):
        y = 36 + number * row
        body.append(f'<text x="8" y="{y + 20}">{name}</text>')
        body += [
            f'<rect x="{x(a)}" y="{y}" width="{max(x(b) - x(a) - 0.6, 0.8):.1f}" height="{row - 14}" fill="{color}"/>'
            for a, b in parts
        ]
    y = 36 + len(bars) * row
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 1e9) if end / s <= 10)
    for tick in np.arange(0, end, step):
        body.append(f'<path d="M{x(tick)},{y}v6" stroke="#444"/><text x="{x(tick)}" y="{y + 20}">{tick:g} ms</text>')
    body.append(f'<path d="M{x(trace["token_ms"])},36V{y}" stroke="#2ca02c"/><text x="{x(trace["token_ms"]) - 60}" ')
    body[-1] += f'y="{y + 36}">first token</text>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 40} {y + 44}" font-family="sans-serif" '
    )
    file.write_text(head + 'font-size="12">\n' + "\n".join(body) + "\n</svg>\n")
