"""OpenAI's chat-completion protocol as this server speaks it: the request body, the response objects, the errors.

Nothing that would change an answer is accepted and then ignored. Fields that are refused unless they are neutral:
``n`` (1), ``tools``, ``tool_choice``, ``functions`` and the like (absent), ``response_format`` (text), penalties (0),
``logit_bias`` (empty), ``modalities`` (text). Fields that are ignored because they change no answer: ``user``,
``metadata``, ``store``, ``service_tier``, ``safety_identifier``, ``prompt_cache_key``, ``parallel_tool_calls``.
``temperature`` defaults to 0 (greedy), as Qwen2.5-VL's generation settings have it, not to OpenAI's 1.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlcache_dist.errors import BadRequest, InvalidPlan, PromptTooLong, Unauthorized, UnknownModel, VLCacheError
from vlcache_dist.prompt import parse_messages
from vlcache_dist.serve.chat import ChatRequest, Delta, Done, SpelledToken
from vlcache_dist.types import FinishReason, ReuseMode, SamplingParams

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="ignored: nothing is padded")


class VLCacheOptions(_Body):
    """The request extension ``vlcache``."""

    reuse: ReuseMode | None = Field(default=None, description="approx, exact or off; default: the server's (approx)")
    plan: str | None = Field(
        default=None, max_length=1000, description="recompute plan of approx: guarded, none, uniform:5, ..."
    )
    prefill_worker: str | None = Field(
        default=None, max_length=200, description="name of the worker that must prefill (tests, demonstrations)"
    )


class ChatCompletionBody(_Body):
    """``POST /v1/chat/completions``."""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, description="extension; 0: all")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    ignore_eos: bool = Field(default=False, description="extension, for measurements")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    vlcache: VLCacheOptions = VLCacheOptions()

    n: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None

    @field_validator(*_NEUTRAL)
    @classmethod
    def _neutral(cls, value: Any, info: Any) -> Any:
        allowed = _NEUTRAL[info.field_name]
        if value is not None and not any(value == neutral and not isinstance(value, bool) for neutral in allowed):
            hint = f"; only {' or '.join(repr(neutral) for neutral in allowed)} is" if allowed else ""
            raise ValueError(f"is not supported{hint}")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        listed = [value] if isinstance(value, str) else value or []
        if len(listed) > 16 or any(not stop or len(stop) > 1000 for stop in listed):
            raise ValueError("at most 16 stop strings of 1 to 1000 characters")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens contradict each other")
        return self

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises BadRequest, which names the field."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise BadRequest("; ".join(_sentence(dict(item)) for item in error.errors(include_url=False))) from error

    def to_request(self, request_id: str, served_model: str) -> ChatRequest:
        """Raises UnknownModel, InvalidPlan, or BadRequest for what the messages hold."""
        if self.model != served_model:
            raise UnknownModel(f"the model {self.model!r} does not exist here; {served_model!r} does")
        options = self.vlcache
        reuse = options.reuse
        if options.plan is not None:
            if reuse not in (None, ReuseMode.APPROX):
                raise InvalidPlan(f"vlcache.plan belongs to reuse: approx, not to {reuse.value}")
            if options.plan.startswith("file:"):
                raise InvalidPlan("vlcache.plan: files are named by the operator, not by a request")
            reuse = ReuseMode.APPROX
        return ChatRequest(
            request_id=request_id,
            conversation=parse_messages(self.messages),
            sampling=self._sampling(),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            reuse=reuse,
            plan=options.plan,
            prefill_worker=options.prefill_worker,
        )

    def _sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=secrets.randbits(31) if self.seed is None else self.seed,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
        )


class Completion:
    """Builds the response objects of one request: one ``chat.completion``, or its chunks."""

    def __init__(self, request_id: str, model: str, created: int, *, logprobs: bool, include_usage: bool) -> None:
        self._head = {"id": request_id, "created": created, "model": model}
        self._logprobs = logprobs
        self._include_usage = include_usage

    def whole(self, deltas: list[Delta], done: Done) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None}
        tokens = [token for delta in deltas for token in delta.tokens]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._spelled(tokens),
            "finish_reason": _finish(done.finish),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(done),
            "vlcache": done.vlcache,
        }

    def opening(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> dict[str, Any]:
        return self._chunk({"content": delta.text}, tokens=list(delta.tokens))

    def closing(self, done: Done) -> list[dict[str, Any]]:
        """The chunk with the finish reason and the ``vlcache`` extension, then usage if it was asked for."""
        last = self._chunk({}, finish=_finish(done.finish)) | {"vlcache": done.vlcache}
        if not self._include_usage:
            return [last]
        return [last, {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(done)}]

    def _chunk(
        self, delta: dict[str, Any], *, tokens: list[SpelledToken] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._spelled(tokens) if tokens else None,
            "finish_reason": finish,
        }
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk

    def _spelled(self, tokens: list[SpelledToken]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [_token(token) | {"top_logprobs": [_token(other) for other in token.top]} for token in tokens]
        return {"content": content, "refusal": None}


def model_card(model: str, created: int, max_model_len: int) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vlcache_dist",
        "max_model_len": max_model_len,
    }


def error_body(error: VLCacheError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if 400 <= error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": _param(error.message), "code": _code(error)}}


def _code(error: VLCacheError) -> str:
    if isinstance(error, UnknownModel):
        return "model_not_found"
    if isinstance(error, Unauthorized):
        return "invalid_api_key"
    if isinstance(error, PromptTooLong):
        return "context_length_exceeded"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error.code).lower()


def _param(message: str) -> str | None:
    found = re.match(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*(?=[:.\s])", message)
    name = re.split(r"[\[.]", found[0])[0] if found else ""
    return found[0] if found and name in ChatCompletionBody.model_fields else None


def _sentence(item: dict[str, Any]) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    if item["type"] == "extra_forbidden":
        return f"{place}: unknown field"
    if item["type"] == "json_invalid":
        return f"the body is not valid JSON: {item['ctx']['error']}"
    reason = item["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason


def _finish(reason: FinishReason) -> str:
    return reason.value


def _usage(done: Done) -> dict[str, Any]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def _token(token: SpelledToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, -9999.0), "bytes": list(token.raw)}
