"""The canary in the engine: what is escalated equals a full run, what is not is served as planned."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.demo.pictures import draw

torch.set_num_threads(1)
ONE_TOKEN = SamplingParams(max_tokens=4, logprobs=5)
JUMPY, CALM = "1,2,5<0.000001", "1,2,5<900"


@lru_cache
def shapes(seed: int) -> dict[str, Any]:
    data = base64.b64encode(draw("shapes", seed).png()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


@lru_cache
def part(seed: int) -> dict[str, Any]:
    data = base64.b64encode(draw("form", seed).png()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def ask(seed: int) -> str:
    return draw("form", seed).facts[0].question


def place(row: int) -> str:
    return f"What is at row {row}, column 1?"


def ruled(seed: int) -> list[dict[str, Any]]:
    """Under a rule that the picture's tokens must know."""
    return user(text("Rows are counted from the bottom.\n"), shapes(seed), text(place(1)))


def swapped() -> list[dict[str, Any]]:
    question = ask(2)
    return user(
        text("Picture 1: "),
        part(2),
        text("\nPicture 2: "),
        part(1),
        text(f"In picture 1, {question[0].lower()}{question[1:]}"),
    )


@pytest.fixture(scope="module")
def shared() -> LLM:
    return LLM("tiny", "cpu", "float32", engine=EngineSettings(store_bytes=32 << 20, kv_bytes=16 << 20))


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Empty caches, then KV of pictures 1 and 2 as "Picture 1" and "Picture 2"."""
    shared.store.clear()
    shared.engine.pool.drop_contents()
    order = user(text("Picture 1: "), part(1), text("\nPicture 2: "), part(2), text("In picture 2, " + ask(2)))
    shared.chat(order, ONE_TOKEN, plan="full")
    yield shared
    shared.engine.validate()
    assert shared.store.stats().pinned == 0 and shared.engine.stats().blocks_free == shared.engine.stats().blocks_total


def same(a: Any, b: Any) -> bool:
    return a.token_ids == b.token_ids and all(
        abs(x.logprob - y.logprob) < 1e-4 for x, y in zip(a.logprobs, b.logprobs, strict=True)
    )


def test_harmful_reuse_is_seen_and_undone(llm: LLM) -> None:
    """A picture that is asked about under a rule, and was recorded without it."""
    for seed in (24, 25, 27):
        llm.chat(user(shapes(seed), text(place(1))), ONE_TOKEN, plan="full")
        full = llm.chat(ruled(seed), ONE_TOKEN, reuse="off")
        blind = llm.chat(ruled(seed), ONE_TOKEN, plan="none")
        truth = {fact.question: fact.answer for fact in draw("shapes", seed).facts}
        assert full.text == truth[place(4)]
        assert blind.text == truth[place(1)] != full.text, "reuse must fail here, or the test proves nothing"
        for plan in ("none+canary:1,2,5<0.5", "guarded"):
            watched = llm.chat(ruled(seed), ONE_TOKEN, plan=plan)
            assert same(watched, full)
            (report,) = watched.vlcache
            assert report.escalated and report.deviation > 1 and report.reused_tokens == 0


def test_a_loan_that_does_not_fit_is_not_believed(llm: LLM) -> None:
    """A rule moves every row of a picture in its own way. An answer that a second pass leaves where it was is still
    wrong then; what is left between loan and tokens tells, in the first pass behind the alarm, and no other is made."""
    once, fits = "none+canary:0,3,5<0.42,again:5@8<1000", ",left:7<0.35"
    wrong = 0
    for seed in (24, 25, 27):
        llm.chat(user(shapes(seed), text(place(1))), ONE_TOKEN, plan="full")
        full = llm.chat(ruled(seed), ONE_TOKEN, reuse="off")
        wrong += llm.chat(ruled(seed), ONE_TOKEN, plan=once).text != full.text
        passes = llm.engine.stats().steps
        undone = llm.chat(ruled(seed), ONE_TOKEN, plan=once + "x3" + fits)
        assert same(undone, full) and undone.vlcache[0].why == "canary"
        warm, again, everything = 1, 1, 1
        assert llm.engine.stats().steps - passes == warm + again + everything + len(undone.token_ids) - 1
    assert wrong, "without the limit a wrong answer must be released here"
    before = llm.chat(swapped(), ONE_TOKEN, plan=once + fits)
    assert {report.why for report in before.vlcache} == {"rechecked"}, "a loan that fits is"


def test_who_configures_nothing_gets_the_right_answer(llm: LLM) -> None:
    """The default plan on pictures that changed their roles: verified or undone, never the wrong answer."""
    full, out = llm.chat(swapped(), ONE_TOKEN, reuse="off"), llm.chat(swapped(), ONE_TOKEN)
    assert out.text == full.text
    assert all(report.deviation > 1 for report in out.vlcache)
    assert {report.why for report in out.vlcache} <= {"rechecked", "canary", "earlier span"}


def test_harmless_reuse_is_left_alone(llm: LLM) -> None:
    question = user(text("Look at the picture. The house is old.\nPicture 1: "), part(1), text(ask(1)))
    out = llm.chat(question, ONE_TOKEN, plan="none+canary:1,2,5<0.5")
    (report,) = out.vlcache
    assert not report.escalated and 0 < report.deviation < 1
    assert (report.recomputed_tokens, report.reused_tokens) == (3, 61)


@pytest.mark.parametrize("budget", [4096, 40], ids=["one-chunk", "many-chunks"])
def test_an_alarm_always_gives_the_full_answer(budget: int) -> None:
    """Whatever comes after the span (new pictures, reused ones), in chunks or at once."""
    settings = EngineSettings(store_bytes=32 << 20, kv_bytes=16 << 20, max_batch_tokens=budget, max_sequences=4)
    llm = LLM("tiny", "cpu", "float32", engine=settings)
    for seed in (1, 2):
        llm.chat(user(part(seed), text(ask(seed))), ONE_TOKEN)
    mixed = user(text("Picture 1: "), part(1), text(" "), part(9), text(" "), part(2), text(ask(2)))
    full = llm.chat(mixed, ONE_TOKEN, reuse="off")
    out = llm.chat(mixed, ONE_TOKEN, plan=f"uniform:5+canary:{JUMPY}")
    assert same(out, full)
    assert [report.escalated for report in out.vlcache] == [True, False, True]
    llm.engine.validate()


def test_escalated_blocks_are_exact_and_unsettled_ones_are_nobodys(llm: LLM) -> None:
    """An escalated prompt is what a full run wrote, so exact requests may start with its blocks; a prompt that was
    served approximately is not."""
    prompt = swapped()
    calm = llm.chat(prompt, ONE_TOKEN, plan=f"none+canary:{CALM}")
    exact = llm.chat(prompt, ONE_TOKEN, reuse="exact")
    assert exact.cached_tokens < exact.prompt_tokens // 4, "approximated blocks were served as exact"
    assert calm.vlcache[0].escalated is False
    other = swapped()[:]
    other[0] = {"role": "user", "content": [text("Well. "), *other[0]["content"]]}
    escalated = llm.chat(other, ONE_TOKEN, plan=f"none+canary:{JUMPY}")
    again = llm.chat(other, ONE_TOKEN, reuse="exact")
    assert same(again, escalated) and again.cached_tokens > again.prompt_tokens // 2
    assert same(again, llm.chat(other, ONE_TOKEN, reuse="off"))


def test_next_turn_starts_with_what_was_approved(llm: LLM) -> None:
    """Blocks of a prompt whose canary stayed calm are found by the next turn, which watches only what it computes."""
    plan = f"none+canary:{CALM}"
    first = llm.chat(swapped(), ONE_TOKEN, plan=plan)
    turns = [*swapped(), {"role": "assistant", "content": first.text}, *user(text(ask(1)))]
    second = llm.chat(turns, ONE_TOKEN, plan=plan)
    assert second.cached_tokens > first.prompt_tokens * 3 // 4
