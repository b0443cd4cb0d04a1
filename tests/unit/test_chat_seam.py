"""What all backends share: length limits, deltas, provenance, metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlcache_dist
from vlcache_dist.errors import PromptTooLong
from vlcache_dist.metrics import Metrics
from vlcache_dist.prompt import PromptBuilder, TokenText, parse_messages
from vlcache_dist.serve.chat import AnswerStream, ChatRequest, provenance
from vlcache_dist.types import KVSource, SamplingParams, SpanReport, TokenLogprobs

TINY = Path(vlcache_dist.__file__).parent / "data" / "tiny"


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder.from_folder(TINY, merge_size=2, max_model_len=4096)


@pytest.mark.parametrize(
    ("asked", "prompt", "given"), [(None, 100, 512), (None, 900, 100), (None, 999, 1), (7, 100, 7), (900, 100, 900)]
)
def test_answer_length(asked: int | None, prompt: int, given: int) -> None:
    conversation = parse_messages([{"role": "user", "content": "x"}])
    request = ChatRequest("r", conversation, SamplingParams(temperature=0.5), max_tokens=asked)
    sampling = request.sampling_for(prompt, 1000)
    assert (sampling.max_tokens, sampling.temperature) == (given, 0.5)


@pytest.mark.parametrize(("asked", "prompt"), [(None, 1000), (901, 100), (1, 1000)])
def test_answer_that_does_not_fit(asked: int | None, prompt: int) -> None:
    conversation = parse_messages([{"role": "user", "content": "x"}])
    with pytest.raises(PromptTooLong, match=f"{prompt} prompt tokens"):
        ChatRequest("r", conversation, SamplingParams(), max_tokens=asked).sampling_for(prompt, 1000)


def test_stop_string_across_tokens(builder: PromptBuilder) -> None:
    stream = AnswerStream(TokenText(builder.tokenizer), SamplingParams(stop=("lue is",)))
    text = ""
    for token in builder.encode("The value is 42"):
        text += stream.feed(token).text
        if stream.stopped:
            break
    assert text + stream.finish().text == "The va" and stream.num_tokens < 6


def test_logprobs_are_spelled_only_on_demand(builder: PromptBuilder) -> None:
    tokens = TokenText(builder.tokenizer)
    (first, *_) = builder.encode("日")
    logprobs = TokenLogprobs(first, -0.25, ((first, -0.25), (850, -3.0)))
    (spelled,) = AnswerStream(tokens, SamplingParams(logprobs=2)).feed(first, logprobs).tokens
    assert spelled.logprob == -0.25 and [top.text for top in spelled.top] == [spelled.text, "<|im_end|>"]
    assert spelled.raw == tokens.raw(first) and "日".encode().startswith(spelled.raw)
    assert AnswerStream(tokens, SamplingParams()).feed(first, logprobs).tokens == ()


def test_provenance_and_metrics() -> None:
    reports = [
        SpanReport("d1", KVSource.REMOTE, 64, 61, 3, 30, 4096, "prefill-0"),
        SpanReport("d2", KVSource.COMPUTED, 16),
    ]
    extension = provenance(reports, prefill_worker="prefill-1")
    assert extension["prefill_worker"] == "prefill-1"
    assert [image["source"] for image in extension["images"]] == ["remote", "computed"]
    metrics = Metrics()
    metrics.finished(100, 61, 5, extension)
    text = metrics.text().decode()
    for line in (
        'vlcache_vision_tokens_total{source="remote"} 64.0',
        "vlcache_cached_tokens_total 61.0",
        "vlcache_recomputed_vision_tokens_total 3.0",
        "vlcache_image_bytes_moved_total 4096.0",
    ):
        assert line in text
    assert Metrics().text() != metrics.text()
