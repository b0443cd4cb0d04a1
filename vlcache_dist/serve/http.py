"""The HTTP surface: a FastAPI application over any ``ChatBackend``.

A client that goes away cancels its request at once, streaming or not, wherever the request is. Until the first event
is there, errors are HTTP errors; after that, in a stream, they are an ``error`` event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vlcache_dist.errors import (
    BadRequest,
    Cancelled,
    EngineError,
    Overloaded,
    PayloadTooLarge,
    Unauthorized,
    UnknownModel,
    VLCacheError,
)
from vlcache_dist.metrics import REQUESTS, RUNNING, TTFT, Metrics
from vlcache_dist.serve.auth import DEFAULT_TENANT, Guard
from vlcache_dist.serve.chat import ChatBackend, ChatEvent, ChatRequest, Delta, Done
from vlcache_dist.serve.openai import ChatCompletionBody, Completion, error_body, model_card

log = logging.getLogger(__name__)
T = TypeVar("T")
Events = AsyncGenerator[ChatEvent, None]


def create_app(
    backend: ChatBackend,
    *,
    max_body_bytes: int = 64 << 20,
    max_ongoing: int = 256,
    metrics: Metrics | None = None,
    lifespan: Callable[[FastAPI], Any] | None = None,
    guard: Guard | None = None,
) -> FastAPI:
    """``/v1/chat/completions``, ``/v1/models``, ``/healthz``, ``/metrics``. Above ``max_ongoing`` requests at a time
    answers 503 (Overloaded). A ``guard`` asks for API keys below ``/v1``; without one everybody is let in."""
    app = FastAPI(title="vlcache_dist", lifespan=lifespan)
    endpoint = _ChatEndpoint(backend, max_body_bytes, max_ongoing, metrics or Metrics(), guard)
    guarded = [Depends(admission(guard))]
    created = int(time.time())

    app.add_api_route(
        "/v1/chat/completions",
        endpoint.handle,
        methods=["POST"],
        response_class=JSONResponse,
        response_model=None,
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": _inline_schema()}}}
        },
    )

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(backend.model, created, backend.max_model_len)]}

    @app.get("/v1/models/{model:path}", dependencies=guarded)
    async def model(model: str) -> dict[str, Any]:
        if model != backend.model:
            raise UnknownModel(f"the model {model!r} does not exist here; {backend.model!r} does")
        return model_card(backend.model, created, backend.max_model_len)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", **await backend.health()}

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(endpoint.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(VLCacheError)
    async def known(_: Request, error: VLCacheError) -> Response:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def routing(_: Request, error: HTTPException) -> Response:
        body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)

    return app


def admission(guard: Guard | None) -> Callable[[Request], str]:
    """The tenant of a request; raises Unauthorized. Also a FastAPI dependency for routes that are added later."""

    def tenant(request: Request) -> str:
        if guard is None:
            return DEFAULT_TENANT
        return guard.tenant(request.headers.get("authorization"), request.client.host if request.client else None)

    return tenant


class _ChatEndpoint:
    def __init__(
        self, backend: ChatBackend, max_body_bytes: int, max_ongoing: int, metrics: Metrics, guard: Guard | None
    ) -> None:
        self._backend = backend
        self._tenant = admission(guard)
        self._max_body_bytes = max_body_bytes
        self._max_ongoing = max_ongoing
        self._ongoing = 0
        self.metrics = metrics

    async def handle(self, request: Request) -> Response:
        """One chat completion."""
        if self._ongoing >= self._max_ongoing:
            self.metrics.record(REQUESTS, status="503")
            raise Overloaded(f"{self._max_ongoing} requests are under way; come back later")
        self._enter()
        streaming = False
        status = 500
        try:
            response = await self._answer(request)
            streaming = isinstance(response, _EventStream)
            status = response.status_code
            return response
        except VLCacheError as error:
            status = error.status
            return _error_response(error)
        except Exception as error:
            log.exception("a request failed unexpectedly")
            return _error_response(_unexpected(error))
        finally:
            if not streaming:
                self._leave(status)

    async def _answer(self, request: Request) -> Response:
        tenant = self._tenant(request)
        body = ChatCompletionBody.parse(await _read_body(request, self._max_body_bytes))
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        chat = msgspec.structs.replace(body.to_request(request_id, self._backend.model), tenant=tenant)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        completion = Completion(
            request_id, self._backend.model, int(time.time()), logprobs=bool(body.logprobs), include_usage=usage
        )
        if not body.stream:
            deltas, done = await _unless_gone(request.receive, self._collect(chat))
            return JSONResponse(completion.whole(deltas, done))
        events = self._backend.chat(chat)
        started = time.monotonic()
        try:
            first = await _unless_gone(request.receive, anext(events))
        except BaseException:
            await events.aclose()
            raise
        self.metrics.record(TTFT, time.monotonic() - started)
        return _EventStream(self._stream(first, events, completion), self._leave)

    async def _collect(self, chat: ChatRequest) -> tuple[list[Delta], Done]:
        deltas: list[Delta] = []
        started = time.monotonic()
        async with aclosing(self._backend.chat(chat)) as events:
            async for event in events:
                if isinstance(event, Done):
                    self._count(event)
                    return deltas, event
                if not deltas:
                    self.metrics.record(TTFT, time.monotonic() - started)
                deltas.append(event)
        raise EngineError("the backend ended without an end")

    async def _stream(self, first: ChatEvent, events: Events, completion: Completion) -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            yield _sse(completion.opening())
            event = first
            try:
                while not isinstance(event, Done):
                    if event.text or event.tokens:
                        yield _sse(completion.piece(event))
                    event = await anext(events)
            except StopAsyncIteration:
                yield _sse(error_body(EngineError("the backend ended without an end")))
                return
            except VLCacheError as error:
                yield _sse(error_body(error))
                return
            except Exception as error:
                log.exception("a stream failed unexpectedly")
                yield _sse(error_body(_unexpected(error)))
                return
            self._count(event)
            for chunk in completion.closing(event):
                yield _sse(chunk)
            yield b"data: [DONE]\n\n"

    def _count(self, done: Done) -> None:
        self.metrics.finished(done.prompt_tokens, done.cached_tokens, done.completion_tokens, done.vlcache)

    def _enter(self) -> None:
        self._ongoing += 1
        self.metrics.record(RUNNING, self._ongoing)

    def _leave(self, status: int) -> None:
        self._ongoing -= 1
        self.metrics.record(RUNNING, self._ongoing)
        self.metrics.record(REQUESTS, status=str(status))


class _EventStream(Response):
    """Server-sent events that stop, and close their source, as soon as the client is gone."""

    def __init__(self, events: AsyncGenerator[bytes, None], on_end: Callable[[int], None]) -> None:
        self._events = events
        self._on_end = on_end
        self.status_code = 200
        self.background = None
        self.raw_headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = Cancelled.status
        try:
            await _unless_gone(receive, self._send(send))
            status = 200
        except (Cancelled, OSError):
            log.info("the client went away in the middle of a stream")
        finally:
            await self._events.aclose()
            self._on_end(status)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``; raises Cancelled, after cancelling it and waiting for its end, when the client goes."""

    async def run() -> T:
        return await work

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(run()), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client went away")
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _read_body(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise PayloadTooLarge(f"the body has {declared} bytes, at most {limit} are taken")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise PayloadTooLarge(f"the body has more than {limit} bytes")
    except ClientDisconnect:
        raise Cancelled("the client went away before its request was complete") from None
    if not body:
        raise BadRequest("the body is empty; a JSON object is wanted")
    return bytes(body)


def _error_response(error: VLCacheError) -> Response:
    headers = {"retry-after": "1"} if error.retryable else {}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def _unexpected(error: Exception) -> VLCacheError:
    return EngineError(f"internal error ({type(error).__name__}); the server's log has the details")


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _inline_schema() -> dict[str, Any]:
    """The body's JSON schema without references: OpenAPI resolves them against the whole document, not against this."""
    schema = ChatCompletionBody.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return resolve(definitions[value["$ref"].rsplit("/", 1)[1]])
        return {key: resolve(item) for key, item in value.items()}

    return dict(resolve(schema))
