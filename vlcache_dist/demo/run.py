"""The main job, end to end: questions about real picture files, over HTTP, cold and warm, against ``reuse=off``."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from vlcache_dist.demo.questions import Question, questions, save_pictures, warm_up

REQUEST_TIMEOUT_S = 60.0
_SMALL = (
    "The bundled model is so small that computing a picture takes no longer than fetching its KV and the messages do: "
    "for times to first token that mean something, see docs/performance.md."
)


class Answer(msgspec.Struct, frozen=True):
    """One streamed completion. ``ttft_ms``: from sending the request to the first token of the answer."""

    text: str
    ttft_ms: float
    vlcache: dict[str, Any]


class Row(msgspec.Struct, frozen=True):
    """One request of the report. ``kv_source`` is that of the picture asked about; token counts are over all pictures.
    ``bytes_moved``: image KV that crossed to the prefill worker; ``handoff_bytes``: KV that crossed to decode.
    ``matches_full``: the same answer as with ``reuse=off``."""

    name: str
    ttft_ms: float
    full_ttft_ms: float
    prefill_worker: str
    kv_source: str
    vision_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    bytes_moved: int
    handoff_bytes: int
    answer: str
    truth: str
    matches_full: bool
    correct: bool


class Report(msgspec.Struct, frozen=True):
    requests: list[Row]
    ok: bool


def ask(client: httpx.Client, messages: list[dict[str, Any]], **vlcache: Any) -> Answer:
    """Stream one chat completion. Raises httpx.HTTPError or RuntimeError with the server's message."""
    body = {"model": "tiny", "messages": messages, "stream": True, "max_tokens": 16, "vlcache": vlcache}
    text, first = "", 0.0
    extension: dict[str, Any] = {}
    started = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"HTTP {reply.status_code}: {reply.read().decode(errors='replace')}")
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            extension = chunk.get("vlcache") or extension
            for choice in chunk["choices"]:
                if content := choice["delta"].get("content"):
                    first = first or time.perf_counter()
                    text += content
    return Answer(text, ((first or time.perf_counter()) - started) * 1e3, extension)


def run(url: str, say: Callable[[str], None], *, api_key: str = "none") -> Report:
    """Ask everything once with reuse and once without. Needs two prefill workers."""
    headers = {"authorization": f"Bearer {api_key}"}
    with (
        tempfile.TemporaryDirectory(prefix="vlcache-demo-") as folder,
        httpx.Client(base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=False) as client,
    ):
        asked = questions(save_pictures(Path(folder)))
        workers = _prefill_workers(client)
        for worker in workers:
            ask(client, warm_up(Path(folder)), reuse="off", prefill_worker=worker)
        rows = []
        for number, question in enumerate(asked, start=1):
            say(f"[{number}/{len(asked)}] {question.name}")
            rows.append(_row(client, question, workers[question.worker]))
    remote = any(row.kv_source == "remote" and row.reused_tokens > 0 for row in rows)
    return Report(rows, remote and all(row.correct and row.matches_full for row in rows))


def show(report: Report, console: Console) -> None:
    """The table at the end."""
    table = Table(title="One picture, any worker", show_lines=False)
    for title in ("request", "worker", "image KV", "vision tokens", "reused", "recomputed", "KV moved", "handoff"):
        table.add_column(title, justify="left" if title in ("request", "worker", "image KV") else "right")
    for title in ("TTFT", "reuse=off", "answer", "= off", "right"):
        table.add_column(title, justify="right")
    for row in report.requests:
        table.add_row(
            row.name,
            row.prefill_worker,
            row.kv_source,
            str(row.vision_tokens),
            str(row.reused_tokens),
            str(row.recomputed_tokens),
            f"{row.bytes_moved / 1024:.0f} KiB",
            f"{row.handoff_bytes / 1024:.0f} KiB",
            f"{row.ttft_ms:.0f} ms",
            f"{row.full_ttft_ms:.0f} ms",
            row.answer,
            "yes" if row.matches_full else "NO",
            "yes" if row.correct else f"NO ({row.truth})",
        )
    console.print(table)
    console.print(_SMALL, style="dim")
    if not report.ok:
        remote = any(row.kv_source == "remote" for row in report.requests)
        console.print("FAILED: " + ("an answer is wrong" if remote else "no image KV came from another worker"))


def _row(client: httpx.Client, question: Question, worker: str) -> Row:
    answer = ask(client, question.messages, prefill_worker=worker)
    full = ask(client, question.messages, prefill_worker=worker, reuse="off")
    images = answer.vlcache["images"]
    return Row(
        name=question.name,
        ttft_ms=round(answer.ttft_ms, 1),
        full_ttft_ms=round(full.ttft_ms, 1),
        prefill_worker=answer.vlcache["prefill_worker"],
        kv_source=images[question.asked]["source"],
        vision_tokens=sum(image["vision_tokens"] for image in images),
        reused_tokens=sum(image["reused_tokens"] for image in images),
        recomputed_tokens=sum(image["recomputed_tokens"] for image in images),
        bytes_moved=sum(image["bytes_moved"] for image in images),
        handoff_bytes=answer.vlcache["handoff_bytes"],
        answer=answer.text,
        truth=question.truth,
        matches_full=answer.text == full.text,
        correct=answer.text == question.truth,
    )


def _prefill_workers(client: httpx.Client) -> list[str]:
    status = client.get("/status").raise_for_status().json()
    names = sorted(worker["name"] for worker in status["workers"] if worker["role"] == "prefill")
    if len(names) < 2:
        raise RuntimeError(f"the demo needs two prefill workers, there are {len(names)}")
    return names
