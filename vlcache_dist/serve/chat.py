"""The seam between HTTP and whatever answers: one request in, events out.

A backend is the distributed ingress, the engine in one process, or a few lines in a test. It knows nothing of
HTTP, and the HTTP layer knows nothing of pools.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import msgspec

from vlcache_dist.errors import PromptTooLong
from vlcache_dist.prompt import Conversation, Detokenizer, TokenText
from vlcache_dist.types import FinishReason, ReuseMode, SamplingParams, SpanReport, TokenLogprobs

DEFAULT_MAX_TOKENS = 512


class ChatRequest(msgspec.Struct, frozen=True):
    """A validated request. ``sampling.max_tokens`` is meaningless until ``sampling_for``: ``max_tokens`` is what the
    client asked for (None: nothing). ``reuse`` and ``plan`` None: the server's defaults. ``prefill_worker``: the name
    of the worker that must prefill (tests and demonstrations)."""

    request_id: str
    conversation: Conversation
    sampling: SamplingParams
    max_tokens: int | None = None
    reuse: ReuseMode | None = None
    plan: str | None = None
    prefill_worker: str | None = None
    tenant: str = "default"

    def sampling_for(self, prompt_tokens: int, max_model_len: int) -> SamplingParams:
        """Sampling with the answer's final length limit. Raises PromptTooLong if what was asked for does not fit."""
        room = max_model_len - prompt_tokens
        wanted = self.max_tokens or min(DEFAULT_MAX_TOKENS, max(room, 1))
        if wanted > room:
            raise PromptTooLong(
                f"{prompt_tokens} prompt tokens and {wanted} for the answer exceed the model's {max_model_len}"
            )
        return msgspec.structs.replace(self.sampling, max_tokens=wanted)


class SpelledToken(msgspec.Struct, frozen=True):
    """A token as a reader sees it, with its natural-log probability; ``top``: the alternatives, best first."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[SpelledToken, ...] = ()


class Delta(msgspec.Struct, frozen=True):
    """A piece of the answer. ``text`` may be empty while characters or stop strings are incomplete; ``tokens`` is
    filled only where logprobs were asked for."""

    text: str
    tokens: tuple[SpelledToken, ...] = ()


class Done(msgspec.Struct, frozen=True):
    """The last event. ``cached_tokens``: prompt tokens that were not computed in full. ``vlcache``: the response
    extension (``provenance``)."""

    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    vlcache: dict[str, Any]


ChatEvent = Delta | Done


class ChatBackend(Protocol):
    """What answers. ``model`` is the id that clients must use."""

    @property
    def model(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Deltas, then one ``Done``. Raises VLCacheError at any point. Closing the generator, or cancelling the task
        that iterates it, aborts the request and frees everything it held."""
        ...

    async def health(self) -> dict[str, Any]:
        """What is running. Raises VLCacheError if no request could be answered now."""
        ...


class AnswerStream:
    """Tokens of one answer to deltas; shared by all backends.

    ``feed`` every token but those that only end the answer (end-of-sequence). When ``stopped`` turns true a stop
    string was found: abort generation and finish with ``FinishReason.STOP``.
    """

    def __init__(self, tokens: TokenText, sampling: SamplingParams) -> None:
        self._tokens = tokens
        self._detokenizer = Detokenizer(tokens, sampling.stop)
        self._wants_logprobs = sampling.logprobs is not None
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._detokenizer.stopped

    def feed(self, token_id: int, logprobs: TokenLogprobs | None = None) -> Delta:
        self.num_tokens += 1
        text = self._detokenizer.feed(token_id)
        spelled = (self._spell(logprobs),) if self._wants_logprobs and logprobs is not None else ()
        return Delta(text, spelled)

    def finish(self) -> Delta:
        """What was held back; its text may be empty."""
        return Delta(self._detokenizer.finish())

    def _spell(self, logprobs: TokenLogprobs) -> SpelledToken:
        top = tuple(self._token(token_id, value) for token_id, value in logprobs.top)
        return msgspec.structs.replace(self._token(logprobs.token_id, logprobs.logprob), top=top)

    def _token(self, token_id: int, logprob: float) -> SpelledToken:
        raw = self._tokens.raw(token_id)
        return SpelledToken(raw.decode("utf-8", "replace"), raw, logprob)


def provenance(reports: Sequence[SpanReport], **more: Any) -> dict[str, Any]:
    """The ``vlcache`` object of a response: ``images`` in order of appearance, and whatever else the backend says
    (``prefill_worker``, ``decode_worker``, ``ttft_ms``, ...)."""
    return {**more, "images": [msgspec.to_builtins(report) for report in reports]}
