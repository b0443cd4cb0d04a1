"""A uvicorn server in a thread, around a small backend that answers without a model."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

import vlcache_dist
from vlcache_dist.config import MediaSettings
from vlcache_dist.errors import VLCacheError
from vlcache_dist.media import MediaProcessor
from vlcache_dist.media_fetch import MediaFetcher
from vlcache_dist.prompt import PromptBuilder, TokenText
from vlcache_dist.serve.chat import AnswerStream, ChatEvent, ChatRequest, Done, provenance
from vlcache_dist.types import FinishReason, KVSource, SpanReport, TokenLogprobs

TINY = Path(vlcache_dist.__file__).parent / "data" / "tiny"
MEDIA = MediaSettings(allow_networks=("127.0.0.0/8",), timeout_s=2.0, max_bytes=200_000, max_pixels=1_000_000)


class ScriptedBackend:
    """Fetches media and builds prompts like a real backend, then says what the test told it to."""

    model = "tiny"
    max_model_len = 1024

    def __init__(self) -> None:
        self.processor = MediaProcessor.from_folder(TINY, MEDIA)
        self.prompts = PromptBuilder.from_folder(TINY, merge_size=2, max_model_len=self.max_model_len)
        self.tokens = TokenText(self.prompts.tokenizer)
        self.answer = "The value is 42."
        self.pause_s = 0.0
        self.fail_after: tuple[int, Exception] | None = None
        self.requests: list[ChatRequest] = []
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.healthy: VLCacheError | None = None

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        self.requests.append(request)
        fetcher = MediaFetcher(MEDIA)
        try:
            items = await fetcher.load_all(request.conversation.media)
            metas = [self.processor.meta(item) for item in items]
            for item in items:
                self.processor.patches(item)
            prompt = self.prompts.build(request.conversation, [item.digest for item in items], metas)
            sampling = request.sampling_for(len(prompt.token_ids), self.max_model_len)
            stream = AnswerStream(self.tokens, sampling)
            finish = FinishReason.STOP
            self.started.set()
            for n, token in enumerate(self.prompts.encode(self.answer)):
                if self.fail_after is not None and n == self.fail_after[0]:
                    raise self.fail_after[1]
                await asyncio.sleep(self.pause_s)
                top = tuple((token + i, -0.5 - i) for i in range(sampling.logprobs or 0))
                yield stream.feed(token, TokenLogprobs(token, -0.5, top))
                if stream.stopped:
                    break
                if stream.num_tokens == sampling.max_tokens:
                    finish = FinishReason.LENGTH
                    break
            yield stream.finish()
            reports = [SpanReport(span.key.hex(), KVSource.COMPUTED, span.length) for span in prompt.spans]
            more = provenance(reports, prefill_worker=request.prefill_worker or "prefill-0", ttft_ms=1.5)
            yield Done(finish, len(prompt.token_ids), stream.num_tokens, 7, more)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            await fetcher.close()

    async def health(self) -> dict[str, Any]:
        if self.healthy is not None:
            raise self.healthy
        return {"workers": 1}


class Served:
    """An application behind a real socket."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self._server.started

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        assert not self._thread.is_alive()


def png(width: int = 112, height: int = 112, color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
