"""Donors in one process: canonical KV is the picture's alone, whatever the first prompt said."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.demo.pictures import Picture, draw
from vlcache_dist.errors import ConfigError
from vlcache_dist.llm import Output
from vlcache_dist.types import KVSource, ObjectKind

SHORT = SamplingParams(max_tokens=8)
SECRETS = ("amber", "cobalt")


def ask(llm: LLM, before: str, picture: Picture, **options: Any) -> Output:
    url = f"data:image/png;base64,{base64.b64encode(picture.png()).decode()}"
    content = [
        {"type": "text", "text": before},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": picture.facts[0].question},
    ]
    return llm.chat([{"role": "user", "content": content}], SHORT, **options)


def kv_of(llm: LLM) -> list[torch.Tensor]:
    """The elements of all image KV in the store."""
    kept = [e for e in llm.store.objects() if e.kind is ObjectKind.KV]
    return [llm.arena.tensor[e.offset : e.offset + e.elements].clone() for e in kept]


def at_rest(llm: LLM) -> bool:
    llm.engine.validate()
    stats, store = llm.engine.stats(), llm.store.stats()
    return (stats.blocks_free, store.pinned, store.filling) == (stats.blocks_total, 0, 0)


@pytest.mark.parametrize("donors", ["first", "background", "canonical"])
def test_what_the_second_use_reads(donors: str) -> None:
    """The same bytes whatever the first prompt said, unless they are the first request's; answers are right."""
    torch.set_num_threads(1)
    picture, kept = draw("form", seed=70), []
    for secret in SECRETS:
        engine = EngineSettings(store_bytes=32 << 20, kv_bytes=16 << 20)
        with LLM(model="tiny", device="cpu", donors=donors, engine=engine) as llm:
            first = ask(llm, f"The code word is {secret}.\n", picture)
            (own,) = kv_of(llm)
            second = ask(llm, "A quiet morning.\n", picture)
            ask(llm, "Exactly.\n", picture, reuse="exact")
            assert [first.text, second.text] == [picture.facts[0].answer] * 2
            assert first.vlcache[0].source is (KVSource.LOCAL if donors == "canonical" else KVSource.COMPUTED)
            assert second.vlcache[0].source is KVSource.LOCAL
            (after,) = kv_of(llm)
            assert torch.equal(own, after) and at_rest(llm)
            kept.append(own)
    assert torch.equal(*kept) == (donors != "first")


def test_canonical_recordings_without_room_are_done_without() -> None:
    """Blocks for one prompt only: the request that waits for the recording computes the picture itself."""
    torch.set_num_threads(1)
    picture = draw("form", seed=71)
    engine = EngineSettings(store_bytes=32 << 20, kv_bytes=16 << 20)
    with LLM(model="tiny", device="cpu", donors="canonical", engine=engine) as llm:
        held = llm.engine.pool.allocate(llm.engine.pool.num_blocks - 9)
        answer = ask(llm, "A stone.\n", picture)
        assert answer.text == picture.facts[0].answer
        assert answer.vlcache[0].source is KVSource.COMPUTED and not kv_of(llm)
        llm.engine.pool.free(held or ())
        assert at_rest(llm)


def test_settings_name_the_policies() -> None:
    with pytest.raises(ConfigError, match="donors"):
        EngineSettings.of(donors="second")
