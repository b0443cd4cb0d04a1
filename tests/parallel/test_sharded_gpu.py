"""Two GPUs, NCCL, a follower on the second: the bundled model answers as on one."""

from __future__ import annotations

import pytest
import torch
from test_sharded_llm import PICTURE, SAMPLING, SIZES, asked

from vlcache_dist import LLM
from vlcache_dist.config import EngineSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_two_gpus_answer_right_and_as_one() -> None:
    one = LLM("tiny", device="cuda:0", engine=EngineSettings(**SIZES))
    with LLM("tiny", device="cuda:0", engine=EngineSettings(tensor_parallel=2, **SIZES)) as two:
        for fact in PICTURE.facts[:2]:
            for text in ("", "A farmer.\n"):
                conversation = asked(text, fact.question)
                ours, theirs = (llm.chat(conversation, SAMPLING, plan="uniform:5") for llm in (two, one))
                assert ours.text == theirs.text == fact.answer
                assert ours.logprobs is not None and theirs.logprobs is not None
                for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                    assert a.logprob == pytest.approx(b.logprob, abs=0.1)  # bf16: sums in another order
        two.engine.validate()
