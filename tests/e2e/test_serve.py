"""The served system as its users meet it: the official ``openai`` client, a real cluster, workers that die."""

from __future__ import annotations

import base64
import functools
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from vlcache_dist.demo.pictures import draw
from vlcache_dist.loadtest.records import Run

pytestmark = pytest.mark.cluster

PICTURE = draw("form", seed=7)
FACT = PICTURE.facts[0]


class Server:
    """A running ``vlcache-dist serve`` and clients for it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)

    def status(self) -> dict[str, dict[str, Any]]:
        workers = httpx.get(f"{self.url}/status", timeout=20).json()["workers"]
        return {worker["name"]: worker for worker in workers}

    def ask(self, *parts: dict[str, Any], **vlcache: Any) -> Any:
        messages = [{"role": "user", "content": list(parts)}]
        return self.client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=16,
            extra_body={"vlcache": vlcache},  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = tmp_path_factory.mktemp("serve") / "settings.yaml"
    settings.write_text(
        "media: {allow_networks: ['127.0.0.0/8']}\n"
        "engine: {store_bytes: 33554432, kv_bytes: 67108864}\n"
        "serve: {directory_shards: 2}\n"
    )
    command = [sys.executable, "-m", "vlcache_dist.cli", "serve", "tiny", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [*command, "--config", str(settings)], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        try:
            for line in process.stderr:
                said += line
                if found := re.search(r"is served at (http://\S+)/v1", said):
                    drain = threading.Thread(target=process.stderr.read, daemon=True)
                    drain.start()
                    yield Server(found[1])
                    break
            else:
                pytest.fail(f"the server did not start:\n{said}")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 130


def image(png: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def wait_for(condition: Any, patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.25)


def test_an_image_is_reused_at_the_other_worker_and_the_usage_says_so(server: Server) -> None:
    cold = server.ask(image(PICTURE.png()), text(FACT.question), prefill_worker="prefill-0")
    warm = server.ask(text("The river.\n"), image(PICTURE.png()), text(FACT.question), prefill_worker="prefill-1")
    assert cold.choices[0].message.content == warm.choices[0].message.content == FACT.answer
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert warm.usage.prompt_tokens_details.cached_tokens == 61
    (about,) = warm.vlcache["images"]
    assert (about["source"], about["reused_tokens"], about["recomputed_tokens"]) == ("remote", 61, 3)
    assert warm.vlcache["prefill_worker"] == "prefill-1" and about["holder"].startswith("prefill-0#")
    assert warm.vlcache["handoff_images"] == 0, "the decode worker has had this image since the first request"


def test_streaming_yields_the_same_answer(server: Server) -> None:
    messages = [{"role": "user", "content": [image(PICTURE.png()), text(FACT.question)]}]
    stream = server.client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},  # type: ignore[call-overload]
    )
    chunks = list(stream)
    answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert answer == FACT.answer
    assert chunks[-1].usage.completion_tokens >= 2


def test_a_second_turn_about_the_same_picture(server: Server) -> None:
    other = PICTURE.facts[1]
    messages = [
        {"role": "user", "content": [image(PICTURE.png()), text(FACT.question)]},
        {"role": "assistant", "content": FACT.answer},
        {"role": "user", "content": other.question},
    ]
    reply = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)  # type: ignore[arg-type]
    assert reply.choices[0].message.content == other.answer


def test_a_picture_by_url_is_the_same_picture(server: Server, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(PICTURE.png())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{web.server_port}/picture.png"
            reply = server.ask({"type": "image_url", "image_url": {"url": url}}, text(FACT.question))
        finally:
            web.shutdown()
            thread.join()
    assert reply.choices[0].message.content == FACT.answer
    assert reply.vlcache["images"][0]["source"] in ("local", "remote", "prefix")


@pytest.mark.parametrize(
    ("parts", "options", "status"),
    [
        ([image(b"not a picture"), text("?")], {}, 400),
        ([image(PICTURE.png()[:200]), text("?")], {}, 400),
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}, text("?")], {}, 400),
        ([text("word " * 5000)], {}, 400),
        ([text("?")], {"plan": "uniform:5", "reuse": "exact"}, 400),
        ([text("?")], {"plan": "diagonal:5"}, 400),
        ([text("?")], {"prefill_worker": "prefill-77"}, 400),
    ],
    ids=["no picture", "cut picture", "unreachable", "too long", "plan with exact", "unknown plan", "unknown worker"],
)
def test_bad_requests_are_refused_and_the_next_one_works(
    server: Server, parts: list[dict[str, Any]], options: dict[str, Any], status: int
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        server.ask(*parts, **options)
    assert refused.value.status_code == status
    assert isinstance(refused.value.body, dict) and refused.value.body["message"]
    reply = server.ask(image(PICTURE.png()), text(FACT.question))
    assert reply.choices[0].message.content == FACT.answer


def test_an_unknown_model_and_malformed_json(server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hello"}])
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=b"{nonsense", timeout=20)
    assert reply.status_code == 400 and "message" in reply.json()["error"]
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert httpx.get(f"{server.url}/healthz", timeout=20).json()["workers"] == {"encoder": 1, "prefill": 2, "decode": 1}


def test_workers_do_not_yield_to_everything_else_on_the_machine(server: Server) -> None:
    workers = server.status()
    assert {"encoder-0", "prefill-0", "prefill-1", "decode-0"} == set(workers)
    for about in workers.values():
        assert os.getpriority(os.PRIO_PROCESS, about["pid"]) == os.getpriority(os.PRIO_PROCESS, 0)


def test_a_load_test_and_the_server_agree(server: Server, tmp_path: Path) -> None:
    load = ["--rate", "3", "--duration", "2.5", "--share", "0", "--share", "75", "--seed", "21", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "vlcache_dist.cli", "loadtest", "--url", server.url, *load]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    run = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Run)
    assert run.workers == {"encoder": 1, "prefill": 2, "decode": 1}
    assert [point.share for point in run.points] == [0.0, 0.75]
    for point in run.points:
        off, approx = point.arms
        for arm in (off, approx):
            s = arm.summary
            assert s.sent == s.answered == 8 and s.refused == s.failed == 0
            assert s.ttft_p50 > 0 and sum(s.tokens.values()) == off.summary.tokens["computed"]
            assert arm.counters["vlcache_requests_total{status=200}"] == 8
            assert arm.counters["vlcache_prompt_tokens_total"] == sum(r.prompt_tokens for r in arm.records)
            assert {sample.role for sample in arm.pools} >= {"prefill", "decode", "encoder"}
            assert s.right >= 0.75  # the model reads these pictures; its rare mistakes are its own
        assert off.summary.hit_share == 0.0 and off.summary.cached_share == 0.0
    cold, warm = (point.arms[1].summary for point in run.points)
    assert cold.hit_share == 0.0
    assert warm.hit_share > 0.3 and warm.recompute_share > 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "encoder-0"])
def test_a_killed_worker_is_replaced_and_answers_stay_right(server: Server, name: str) -> None:
    server.ask(image(PICTURE.png()), text(FACT.question))
    before = server.status()[name]
    os.kill(before["pid"], signal.SIGKILL)

    def answers() -> bool:
        try:
            reply = server.ask(text("A river.\n"), image(PICTURE.png()), text(FACT.question))
        except openai.InternalServerError as error:
            if error.status_code != 503:  # the only decode worker is gone: nothing else may be wrong
                raise
            return False
        assert reply.choices[0].message.content == FACT.answer
        return True

    wait_for(answers)
    wait_for(lambda: server.status().get(name, before)["worker_id"] != before["worker_id"])
    assert answers()


def test_a_killed_ingress_listens_again_at_the_same_address(server: Server) -> None:
    def pid() -> int:
        try:
            return int(httpx.get(f"{server.url}/status", timeout=5).raise_for_status().json()["ingress"]["pid"])
        except httpx.HTTPError:
            return 0

    before = pid()
    assert before
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: pid() not in (0, before))
    wait_for(lambda: httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200)
    reply = server.ask(text("A hill.\n"), image(PICTURE.png()), text(FACT.question))
    assert reply.choices[0].message.content == FACT.answer
