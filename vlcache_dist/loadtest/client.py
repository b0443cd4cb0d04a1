"""The streaming client of one process: requests leave on schedule, whatever has become of those before them."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import msgspec

from vlcache_dist.loadtest.dataset import Request
from vlcache_dist.loadtest.records import Record

REFUSALS = (429, 503)
DEAD_AFTER = 8  #: connections in a row that were not made: nobody is there any more
BATCH_S = 0.25


class Target(msgspec.Struct, frozen=True):
    """Where traffic goes, and nowhere else. ``keys``: API keys; tenant n sends with key n (modulo their number)."""

    url: str
    model: str
    keys: tuple[str, ...] = ()

    def headers(self, tenant: int = 0) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant % len(self.keys)]}"} if self.keys else {}


class Job(msgspec.Struct, frozen=True):
    """One client's part of a measurement. ``start``: wall-clock seconds of the common start, the same for all clients;
    ``arrivals``: seconds after it, one per request. A request that has no answer ``timeout_s`` after its time has
    failed."""

    client: str
    target: Target
    reuse: str
    start: float
    arrivals: tuple[float, ...]
    requests: tuple[Request, ...]
    timeout_s: float


def drive(job: Job) -> Iterator[list[Record]]:
    """Send everything, yield records in batches as requests end. Closing the iterator cancels what is under way."""
    results: queue.SimpleQueue[Record | BaseException | None] = queue.SimpleQueue()
    sender = _Sender(job, results)
    thread = threading.Thread(target=sender.run, name=job.client, daemon=True)
    thread.start()
    try:
        ended = False
        while not ended:
            batch: list[Record] = []
            horizon = time.monotonic() + BATCH_S
            while not ended and (left := horizon - time.monotonic()) > 0:
                try:
                    result = results.get(timeout=left)
                except queue.Empty:
                    break
                if isinstance(result, BaseException):
                    raise result
                ended = result is None
                if result is not None:
                    batch.append(result)
            if batch:
                yield batch
    finally:
        sender.stop()
        thread.join()


class _Sender:
    """The event loop of one client, in a thread of its own."""

    def __init__(self, job: Job, results: queue.SimpleQueue[Record | BaseException | None]) -> None:
        self._job = job
        self._results = results
        self._refused_connections = 0
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] | None = None

    def run(self) -> None:
        try:
            self._main = self._loop.create_task(self._send_all())
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._results.put(error)
        finally:
            self._results.put(None)
            self._loop.close()

    def stop(self) -> None:
        if self._main is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._main.cancel)

    async def _send_all(self) -> None:
        job = self._job
        bodies = [request.body(job.target.model, job.reuse) for request in job.requests]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        origin = time.monotonic() + (job.start - time.time())
        async with httpx.AsyncClient(limits=limits, timeout=job.timeout_s) as http, asyncio.TaskGroup() as tasks:
            for at, request, body in zip(job.arrivals, job.requests, bodies, strict=True):
                await asyncio.sleep(max(0.0, origin + at - time.monotonic()))
                tasks.create_task(self._send(http, request, body, at, origin))

    async def _send(self, http: httpx.AsyncClient, request: Request, body: bytes, at: float, origin: float) -> None:
        reply = _Reply(origin)
        if self._refused_connections >= DEAD_AFTER:
            reply.error = f"not sent: {DEAD_AFTER} connections in a row were not made"
        else:
            try:
                async with asyncio.timeout(max(0.001, origin + at + self._job.timeout_s - time.monotonic())):
                    await reply.read(http, self._job.target, body, request.tenant)
                self._refused_connections = 0
            except httpx.ConnectError as error:
                self._refused_connections += 1
                reply.error = f"no connection: {error}"
            except TimeoutError:
                reply.error = f"no answer within {self._job.timeout_s:g} s of its time"
            except (httpx.HTTPError, ValueError) as error:
                reply.error = f"{type(error).__name__}: {error}"
        self._results.put(reply.record(self._job.client, request, at))


class _Reply:
    """What came back so far; times are of the monotonic clock."""

    def __init__(self, origin: float) -> None:
        self._origin = origin
        self._sent = time.monotonic()
        self._pieces: list[float] = []
        self._http_status = 0
        self._complete = False
        self._text = ""
        self._usage: dict[str, Any] = {}
        self._extension: dict[str, Any] = {}
        self.error = ""

    async def read(self, http: httpx.AsyncClient, target: Target, body: bytes, tenant: int) -> None:
        """Send and read to the end. Raises httpx.HTTPError, ValueError for what is no event stream, TimeoutError."""
        headers = {"content-type": "application/json", **target.headers(tenant)}
        self._sent = time.monotonic()
        url = f"{target.url}/v1/chat/completions"
        async with http.stream("POST", url, content=body, headers=headers) as reply:
            self._http_status = reply.status_code
            if reply.status_code != 200:
                self.error = (await reply.aread()).decode(errors="replace")[:500]
                return
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    self._event(line[6:])

    def _event(self, data: str) -> None:
        if data == "[DONE]":
            self._complete = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = str(chunk["error"]["message"])
            return
        self._usage = chunk.get("usage") or self._usage
        self._extension = chunk.get("vlcache") or self._extension
        for choice in chunk["choices"]:
            if content := choice["delta"].get("content"):
                self._pieces.append(time.monotonic())
                self._text += content

    def record(self, client: str, request: Request, at: float) -> Record:
        ended = time.monotonic()
        scheduled = self._origin + at
        answered = self._complete and not self.error
        if self._http_status == 200 and not answered and not self.error:
            self.error = "the stream ended before its end"
        refused = self._http_status in REFUSALS
        pieces = self._pieces or [ended]
        return Record(
            index=request.index,
            tenant=request.tenant,
            client=client,
            scheduled_s=round(at, 6),
            sent_s=round(self._sent - self._origin, 6),
            status="answered" if answered else "refused" if refused else "failed",
            http_status=self._http_status,
            error=self.error,
            ttft_ms=round((pieces[0] - scheduled) * 1e3, 3) if answered else 0.0,
            itl_ms=_gaps(pieces) if answered else (),
            total_ms=round((ended - scheduled) * 1e3, 3),
            answer=self._text,
            expected=request.expected,
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            cached_tokens=(self._usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            completion_tokens=self._usage.get("completion_tokens", 0),
            prefill_worker=self._extension.get("prefill_worker", ""),
            decode_worker=self._extension.get("decode_worker", ""),
            handoff_bytes=self._extension.get("handoff_bytes", 0),
            images=tuple(self._extension.get("images", ())),
        )


def _gaps(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(round((after - before) * 1e3, 3) for before, after in itertools.pairwise(times))
