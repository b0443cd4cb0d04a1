"""``LLM`` over two ranks, the second a process of its own, against ``LLM`` over one."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.demo.pictures import draw
from vlcache_dist.errors import ConfigError, WorkerLost

PICTURE = draw("form", seed=3)
SIZES = {"store_bytes": 32 << 20, "kv_bytes": 32 << 20}
SAMPLING = SamplingParams(max_tokens=16, logprobs=2)


def asked(text: str, question: str) -> list[dict[str, Any]]:
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.png()).decode()}"
    content = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]


def test_two_ranks_answer_as_one_and_end_with_it() -> None:
    one = LLM("tiny", device="cpu", engine=EngineSettings(**SIZES))
    fact, other = PICTURE.facts[:2]
    with LLM("tiny", device="cpu", engine=EngineSettings(tensor_parallel=2, **SIZES)) as two:
        (handle,) = two.engine.runner._group._handles  # type: ignore[attr-defined]
        requests = (("", fact, "uniform:5"), ("A farmer.\n", other, "pyramid:20-2"), ("", fact, "none"))
        for text, question, plan in requests:
            conversation = asked(text, question.question)
            ours, theirs = (llm.chat(conversation, SAMPLING, plan=plan) for llm in (two, one))
            assert ours.text == theirs.text == question.answer
            assert (ours.token_ids, ours.vlcache) == (theirs.token_ids, theirs.vlcache)
            assert ours.logprobs is not None and theirs.logprobs is not None
            for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        two.engine.validate()
    assert handle.wait(0.0)
    with pytest.raises(WorkerLost):
        two.chat(asked("", fact.question), SAMPLING)


def test_a_size_that_does_not_fit_is_refused_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel = 3: .*choose one of 1, 2"):
        LLM("tiny", device="cpu", engine=EngineSettings(tensor_parallel=3, **SIZES))
