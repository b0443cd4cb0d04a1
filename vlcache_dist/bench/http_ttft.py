"""Time to first token as a client sees it: HTTP in, first SSE chunk with text out, one request at a time.

A deployment on two devices, each an encoder and a prefill worker, answers streaming requests for pictures that are new
(*cold*; *off*: with ``reuse=off``), that the same prefill worker has answered for (*local*), or that only the other one
has (*remote*). The client is a keep-alive connection that reads lines; building the body is not timed, sending it is.
``worker_ms`` is what the prefill worker says of the same requests (admission to first token, fetches included), so
``ttft_ms - worker_ms`` is what HTTP, media, tokenizing, placement and RPC cost. ``second_ms``: from the first chunk to
the second, a handoff to the decode worker between them where there is one.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

PIXELS = 28  #: side of a vision token
TEXT = 48  #: words before and behind the picture, together


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times in ms."""

    ttft_ms: float
    second_ms: float
    total_ms: float
    tokens: int
    extension: dict[str, Any]

    @property
    def sources(self) -> list[str]:
        return [str(image["source"]) for image in self.extension["images"]]


class Client:
    """One connection to an endpoint that serves ``model``."""

    def __init__(self, url: str, model: str, timeout_s: float = 110.0) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=timeout_s)
        self._model = model
        self._rng = np.random.default_rng(7)

    def ask(self, picture: bytes, *, worker: str, reuse: str = "approx", max_tokens: int = 4) -> Answer:
        """A question of random words around a JPEG, to the prefill worker of that name. Raises RuntimeError for any
        other answer than a whole stream."""
        words = ["".join(chr(97 + c) for c in self._rng.integers(0, 26, 5)) for _ in range(TEXT)]
        url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        content = [
            {"type": "text", "text": " ".join(words[: TEXT // 2])},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": " ".join(words[TEXT // 2 :])},
        ]
        body = json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "vlcache": {"reuse": reuse, "prefill_worker": worker},
            }
        ).encode()
        started = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        reply = self._connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"HTTP {reply.status}: {reply.read(500).decode(errors='replace')}")
        pieces: list[float] = []
        extension: dict[str, Any] = {}
        whole = False
        while line := reply.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                whole = True
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            extension = chunk.get("vlcache") or extension
            pieces += [now for choice in chunk["choices"] if choice["delta"].get("content")]
        if not whole or len(pieces) < 2:
            raise RuntimeError(f"the stream ended after {len(pieces)} pieces")
        ms = [(at - started) * 1e3 for at in pieces]
        return Answer(ms[0], ms[1] - ms[0], ms[-1], len(pieces), extension)

    def close(self) -> None:
        self._connection.close()


def picture(tokens: int, seed: int) -> bytes:
    """A JPEG of about ``tokens`` vision tokens, square: clouds of colour with a little grain, some 100 kB a million
    pixels."""
    from PIL import Image

    side = max(2, round(tokens**0.5)) * PIXELS
    rng = np.random.default_rng(seed)
    clouds = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    grain = rng.integers(-6, 7, (side, side, 1), dtype=np.int16)
    out = io.BytesIO()
    Image.fromarray((np.asarray(clouds, np.int16) + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def measure(
    client: Client, workers: Sequence[str], tokens: int, pictures: Sequence[bytes], local_runs: int, max_tokens: int = 4
) -> list[dict[str, Any]]:
    """Rows of one layout at one size. ``pictures`` are new to the deployment; half of them are asked about with
    ``reuse=off``, which leaves them new."""
    first, second = workers[0], workers[-1]
    off = [client.ask(p, worker=first, reuse="off", max_tokens=max_tokens) for p in pictures[: len(pictures) // 2]]
    cold = [client.ask(p, worker=first, max_tokens=max_tokens) for p in pictures]
    remote = [client.ask(p, worker=second, max_tokens=max_tokens) for p in pictures] if first != second else []
    local = [client.ask(pictures[0], worker=first, max_tokens=max_tokens) for _ in range(local_runs)]
    groups = {"off": off, "cold": cold, "remote": remote, "local": local}
    return [{"vision_tokens": tokens, "kind": kind, **row(answers)} for kind, answers in groups.items() if answers]


def row(answers: Sequence[Answer]) -> dict[str, Any]:
    """Medians; ``sources``: where the pictures' KV came from, all requests counted."""
    found: dict[str, int] = {}
    for answer in answers:
        for source in answer.sources:
            found[source] = found.get(source, 0) + 1

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    worker = [a.extension["compute_ms"] + a.extension["queue_ms"] for a in answers]
    return {
        "requests": len(answers),
        "sources": found,
        "ttft_ms": median([a.ttft_ms for a in answers]),
        "ttft_max_ms": round(max(a.ttft_ms for a in answers), 3),
        "worker_ms": median(worker),
        "around_ms": median([a.ttft_ms - w for a, w in zip(answers, worker, strict=True)]),
        "second_ms": median([a.second_ms for a in answers]),
        "itl_ms": median([(a.total_ms - a.ttft_ms - a.second_ms) / max(1, a.tokens - 2) for a in answers]),
        "handoff_bytes": median([a.extension.get("handoff_bytes", 0) for a in answers]),
        "handoff_images": median([a.extension.get("handoff_images", 0) for a in answers]),
        "all_ttft_ms": [round(a.ttft_ms, 3) for a in answers],
    }
