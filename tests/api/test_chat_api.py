"""The endpoint as OpenAI's own client sees it, over a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from scripted_server import ScriptedBackend, Served, data_url, png

from vlcache_dist.errors import EngineError, Overloaded
from vlcache_dist.serve.http import create_app

TEXT: list[Any] = [{"role": "user", "content": "What is the value of QF?"}]


def image_message(url: str, text: str = "What is the value of QF?") -> list[Any]:
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}
    ]


def test_answer_with_image_provenance_and_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=image_message(data_url(png())), max_tokens=32)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "The value is 42."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra is not None
    (image,) = answer.model_extra["vlcache"]["images"]
    assert image["source"] == "computed" and image["vision_tokens"] == 16
    assert answer.model_extra["vlcache"]["prefill_worker"] == "prefill-0"


def test_stream_yields_the_same_text_then_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=TEXT, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The value is 42."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    extension = [c.model_extra["vlcache"] for c in chunks if c.model_extra and "vlcache" in c.model_extra]
    assert [e["prefill_worker"] for e in extension] == ["prefill-0"]


def test_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=TEXT, stream=True))
    assert all(c.choices and c.usage is None for c in chunks)


def test_multi_turn_with_several_images_in_order(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    first, second = data_url(png(112, 112)), data_url(png(112, 224))
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": [
            {"type": "text", "text": "Picture 1: "}, {"type": "image_url", "image_url": {"url": first}},
            {"type": "text", "text": "Picture 2: "},
            {"type": "image_url", "image_url": {"url": second, "detail": "auto"}},
        ]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "In picture 2, what is the value of QF?"},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
    assert answer.model_extra is not None
    assert [image["vision_tokens"] for image in answer.model_extra["vlcache"]["images"]] == [16, 32]
    assert [ref.where for ref in backend.requests[-1].conversation.media] == [
        "messages[1].content[1]",
        "messages[1].content[3]",
    ]


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TEXT, logprobs=True, top_logprobs=3, max_tokens=4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 4
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)
    assert b"".join(bytes(t.bytes or []) for t in logprobs.content).decode() == answer.choices[0].message.content
    plain = client.chat.completions.create(model="tiny", messages=TEXT, logprobs=True, max_tokens=2)
    assert plain.choices[0].logprobs is not None and plain.choices[0].logprobs.content is not None
    assert [token.top_logprobs for token in plain.choices[0].logprobs.content] == [[], []]


def test_streamed_logprobs_cover_every_token(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=TEXT, stream=True, logprobs=True, stop="zzz")
    tokens = [t for c in stream if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert b"".join(bytes(t.bytes or []) for t in tokens).decode() == "The value is 42."


def test_length_limit_and_stop_strings(client: openai.OpenAI) -> None:
    short = client.chat.completions.create(model="tiny", messages=TEXT, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None and short.usage.completion_tokens == 2
    stopped = client.chat.completions.create(model="tiny", messages=TEXT, stop=["lue is", "nothing"])
    assert stopped.choices[0].message.content == "The va"
    assert stopped.choices[0].finish_reason == "stop"


def test_sampling_reaches_the_backend(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    client.chat.completions.create(
        model="tiny", messages=TEXT, temperature=0.7, top_p=0.9, seed=11, extra_body={"top_k": 5, "ignore_eos": True}
    )
    sampling = backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0.7, 0.9, 11, 5)
    assert sampling.ignore_eos
    client.chat.completions.create(model="tiny", messages=TEXT)
    assert backend.requests[-1].sampling.temperature == 0.0


def test_extension_reaches_the_backend(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    options = {"reuse": "approx", "plan": "uniform:2", "prefill_worker": "prefill-1"}
    answer = client.chat.completions.create(model="tiny", messages=TEXT, extra_body={"vlcache": options})
    seen = backend.requests[-1]
    assert (seen.reuse, seen.plan, seen.prefill_worker) == ("approx", "uniform:2", "prefill-1")
    assert answer.model_extra is not None and answer.model_extra["vlcache"]["prefill_worker"] == "prefill-1"
    client.chat.completions.create(model="tiny", messages=TEXT, extra_body={"vlcache": {"reuse": "off"}})
    assert backend.requests[-1].reuse == "off" and backend.requests[-1].plan is None
    client.chat.completions.create(model="tiny", messages=TEXT)
    assert backend.requests[-1].reuse is None


BAD_BODIES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "gpt-4o"}, 404, "model_not_found", None),
    ({"messages": []}, 400, "bad_request", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "bad_request", "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        400,
        "bad_request",
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "bad_request", "messages[0].content"),
    ({"n": 2}, 400, "bad_request", "n"),
    ({"n": True}, 400, "bad_request", "n"),
    ({"tools": [{"type": "function"}]}, 400, "bad_request", "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "bad_request", "response_format"),
    ({"presence_penalty": 0.5}, 400, "bad_request", "presence_penalty"),
    ({"logit_bias": {"1": 5}}, 400, "bad_request", "logit_bias"),
    ({"temperature": -1}, 400, "bad_request", "temperature"),
    ({"top_logprobs": 3}, 400, "bad_request", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "bad_request", "top_logprobs"),
    ({"max_tokens": 0}, 400, "bad_request", "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "bad_request", "max_tokens"),
    ({"stop": [""]}, 400, "bad_request", "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "bad_request", "stream_options"),
    ({"no_such_field": 1}, 400, "bad_request", None),
    ({"vlcache": {"reuse": "off", "plan": "uniform:5"}}, 400, "invalid_plan", "vlcache.plan"),
    ({"vlcache": {"reuse": "exact", "plan": "none"}}, 400, "invalid_plan", "vlcache.plan"),
    ({"vlcache": {"plan": "file:/etc/passwd"}}, 400, "invalid_plan", "vlcache.plan"),
    ({"vlcache": {"reuse": "maybe"}}, 400, "bad_request", "vlcache.reuse"),
    ({"vlcache": {"uuid": "x"}}, 400, "bad_request", "vlcache.uuid"),
    ({"max_tokens": 5000}, 400, "context_length_exceeded", None),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context_length_exceeded", None),
    ({"messages": image_message("data:image/png;base64,AAAA")}, 400, "invalid_media", "messages[0].content[0]"),
    ({"messages": image_message("data:image/png;base64,!!")}, 400, "invalid_media", "messages[0].content[0]"),
    ({"messages": image_message("data:text/html;base64,AAAA")}, 400, "invalid_media", "messages[0].content[0]"),
    ({"messages": image_message(data_url(png()[:60]))}, 400, "invalid_media", "messages[0].content[0]"),
    ({"messages": image_message(data_url(png(1200, 1200)))}, 400, "invalid_media", "messages[0].content[0]"),
    ({"messages": image_message("data:image/png;base64," + "A" * 300_000)}, 413, "payload_too_large", None),
    ({"messages": image_message("http://127.0.0.1:9/x.png")}, 400, "invalid_media", "messages[0].content[0]"),
    ({"messages": image_message("http://no-such-host.invalid/x.png")}, 400, "invalid_media", None),
    ({"messages": image_message("http://10.1.2.3/x.png")}, 400, "invalid_media", None),
    ({"messages": image_message("file:///etc/passwd")}, 400, "invalid_media", None),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), BAD_BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_in_openai_shape_and_the_next_one_works(
    server: Served,
    client: openai.OpenAI,
    change: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
    stream: bool,
) -> None:
    body = {"model": "tiny", "messages": TEXT, **change} | ({"stream": True} if stream else {})
    if stream and "stream_options" in change:
        return
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=10)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["code"] == code
    if param is not None:
        assert error["param"] == param
    assert client.chat.completions.create(model="tiny", messages=TEXT).choices[0].message.content


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "tiny"}', b"[" * 5000])
def test_malformed_bodies(server: Served, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=10)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_body_limit_with_and_without_declared_length(server: Served) -> None:
    body = b'{"model": "' + b"x" * 500_000 + b'"}'
    declared = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=10)
    chunked = httpx.post(
        f"{server.url}/v1/chat/completions", content=iter([body[:250_000], body[250_000:]]), timeout=10
    )
    assert [declared.status_code, chunked.status_code] == [413, 413]
    assert chunked.json()["error"]["code"] == "payload_too_large"


def test_typed_client_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.chat.completions.create(model="gpt-4o", messages=TEXT)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=TEXT, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )


def test_image_by_url_with_redirect(client: openai.OpenAI, serve: Callable[[Any], Served]) -> None:
    files = serve(
        _files({"/a.png": (200, {"content-type": "image/png"}, png()), "/b": (302, {"location": "/a.png"}, b"")})
    )
    answer = client.chat.completions.create(model="tiny", messages=image_message(f"{files.url}/b"))
    assert answer.model_extra is not None and answer.model_extra["vlcache"]["images"][0]["vision_tokens"] == 16


def test_failure_before_the_first_token_is_an_http_error(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.fail_after = (0, Overloaded("queues are full"))
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="tiny", messages=TEXT, stream=stream)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.body["type"] == "server_error"  # type: ignore[index, call-overload]


@pytest.mark.parametrize("error", [EngineError("a forward pass failed"), RuntimeError("secret detail")])
def test_failure_in_the_middle_of_a_stream_is_an_event(
    client: openai.OpenAI, backend: ScriptedBackend, error: Exception
) -> None:
    backend.fail_after = (3, error)
    stream = client.chat.completions.create(model="tiny", messages=TEXT, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert "secret" not in str(caught.value)
    backend.fail_after = None
    assert client.chat.completions.create(model="tiny", messages=TEXT).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_the_backend(server: Served, backend: ScriptedBackend, stream: bool) -> None:
    backend.answer, backend.pause_s = "word " * 200, 0.05
    body = {"model": "tiny", "messages": TEXT, "stream": stream}
    with httpx.Client() as http:
        try:
            with http.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=0.4) as answer:
                next(answer.iter_lines())
        except httpx.ReadTimeout:
            assert not stream
    assert backend.started.wait(2)
    assert backend.cancelled.wait(2), "the backend went on without a client"


def test_a_client_that_goes_away_before_the_first_token(server: Served, backend: ScriptedBackend) -> None:
    backend.pause_s = 30.0
    body = {"model": "tiny", "messages": TEXT, "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    assert backend.cancelled.wait(2)


def test_admission_limit(backend: ScriptedBackend, serve: Callable[[Any], Served]) -> None:
    small = serve(create_app(backend, max_ongoing=1))
    backend.pause_s = 0.1
    body = {"model": "tiny", "messages": TEXT}
    results: list[int] = []
    busy = threading.Thread(
        target=lambda: results.append(httpx.post(f"{small.url}/v1/chat/completions", json=body, timeout=20).status_code)
    )
    busy.start()
    assert backend.started.wait(5)
    refused = httpx.post(f"{small.url}/v1/chat/completions", json=body, timeout=10)
    busy.join(20)
    assert results == [200] and refused.status_code == 503
    assert httpx.post(f"{small.url}/v1/chat/completions", json=body, timeout=20).status_code == 200


def test_models_health_metrics_and_unknown_routes(
    server: Served, client: openai.OpenAI, backend: ScriptedBackend
) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok", "workers": 1}
    backend.healthy = Overloaded("no prefill worker")
    assert httpx.get(f"{server.url}/healthz").status_code == 503
    client.chat.completions.create(model="tiny", messages=image_message(data_url(png())))
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'vlcache_vision_tokens_total{source="computed"}' in metrics
    assert "vlcache_requests_running 0.0" in metrics
    missing = httpx.get(f"{server.url}/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"
    wrong_method = httpx.get(f"{server.url}/v1/chat/completions")
    assert wrong_method.status_code == 405 and "error" in wrong_method.json()


def test_openapi_describes_the_body(server: Served) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model", "vlcache"} <= set(schema["properties"])
    assert "$ref" not in json.dumps(schema)


def _files(files: dict[str, tuple[int, dict[str, str], bytes]]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        status, headers, body = files.get(scope["path"], (404, {}, b""))
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    return app
