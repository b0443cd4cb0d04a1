"""Workers that die or freeze in the middle of a request: the answer is the one an undisturbed request gets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from pools import Pools, picture

from vlcache_dist.errors import WorkerLost
from vlcache_dist.serve.chat import Delta, Done
from vlcache_dist.types import ObjectKind

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 120, "logprobs": 0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pools() -> AsyncIterator[Pools]:
    """In this process a pool of one each, and in others a second of each, to be killed in the order of the tests."""
    async with Pools(encoders=1, prefills=1, decodes=1, processes=("encoder-1", "prefill-1", "decode-1")) as pools:
        yield pools


def spelled(event: Delta) -> list[str]:
    return [token.text for token in event.tokens]


async def undisturbed(pools: Pools, *prompt: Any, **options: Any) -> list[str]:
    """The tokens of an answer that nothing happens to."""
    return [text async for e in pools.events(*prompt, **LONG, **options) if isinstance(e, Delta) for text in spelled(e)]


def prefer(patch: pytest.MonkeyPatch, pools: Pools, name: str) -> None:
    """Placement takes ``name`` for everything, as long as it has not failed the request."""
    dispatch = pools.frontend._dispatch

    def candidate(exclude: Any) -> Any:
        return next((m for m in dispatch._members() if m.info.name == name and m.info.worker_id not in exclude), None)

    def prefill(demand: Any, pin: Any, exclude: Any) -> Any:
        return original_prefill(demand, pin if candidate(exclude) is None else name, exclude)

    original_prefill, original_decode = dispatch.choose_prefill, dispatch.choose_decode
    if name.startswith("decode"):
        patch.setattr(dispatch, "choose_decode", lambda exclude: candidate(exclude) or original_decode(exclude))
    else:
        patch.setattr(dispatch, "choose_prefill", prefill)


def named(pools: Pools, name: str) -> Any:
    return next(member.info for member in pools.frontend.node.members() if member.info.name == name)


async def gone(pools: Pools, name: str) -> None:
    await pools.until(lambda: all(member.info.name != name for member in pools.frontend.node.members()))
    await pools.drained()


async def test_encoder_dies_between_lookup_and_encoding(pools: Pools) -> None:
    address = named(pools, "encoder-1").address
    front = pools.frontend
    images = [picture(seed) for seed in range(100, 112)]
    before = pools.encoded
    answers = await asyncio.gather(*(pools.ask(image, image.facts[0].question) for image in images[:6]))
    assert [answer.text for answer in answers] == [image.facts[0].answer for image in images[:6]]
    assert 0 < pools.encoded - before < 6, "both encoders take their share"
    assert address in front.node.encoders(b"\x00" * 32)
    pools.processes["encoder-1"].kill()
    before = pools.encoded
    answers = await asyncio.gather(*(pools.ask(image, image.facts[0].question) for image in images[6:12]))
    assert [answer.text for answer in answers] == [image.facts[0].answer for image in images[6:12]]
    assert pools.encoded - before == 6
    # Encoder output that the dead one had is encoded again.
    again = await asyncio.gather(*(pools.ask("A.\n", image, image.facts[1].question) for image in images[:6]))
    assert [answer.text for answer in again] == [image.facts[1].answer for image in images[:6]]
    await gone(pools, "encoder-1")


async def test_decode_freezes_in_the_middle_of_an_answer(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says anything any more: two seconds of silence are a death. Then it wakes up, and is told so."""
    image = picture(141)
    prompt = (image, image.facts[0].question)
    whole = await undisturbed(pools, *prompt)
    prefer(monkeypatch, pools, "decode-1")
    answer, done = [], None
    try:
        async for event in pools.events(*prompt, **LONG):
            if isinstance(event, Done):
                done = event
            else:
                answer += spelled(event)
            if len(answer) == 5:
                pools.processes["decode-1"].send(signal.SIGSTOP)
    finally:
        pools.processes["decode-1"].send(signal.SIGCONT)
    assert done is not None and done.vlcache["retries"] == 1
    assert answer == whole
    await asyncio.sleep(1.0)
    assert named(pools, "decode-1"), "it has joined again"
    await pools.drained()


async def test_decode_dies_in_the_middle_of_an_answer(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(142)
    prompt = ("The river.\n", image, image.facts[0].question)
    whole = await undisturbed(pools, *prompt)
    prefer(monkeypatch, pools, "decode-1")
    answers: tuple[list[str], list[str]] = ([], [])
    dones = []

    async def follow(answer: list[str]) -> None:
        async for event in pools.events(*prompt, **LONG):
            if isinstance(event, Done):
                dones.append(event)
            else:
                answer += spelled(event)
            if min(map(len, answers)) == 4:
                pools.processes["decode-1"].kill()

    await asyncio.gather(*map(follow, answers))
    assert answers == (whole, whole)
    assert [done.vlcache["retries"] for done in dones] == [1, 1]
    assert [done.completion_tokens for done in dones] == [120, 120]
    assert {done.vlcache["decode_worker"] for done in dones} == {"decode-0"}
    await gone(pools, "decode-1")


async def test_a_frozen_holder(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(144)
    process, info = pools.processes["prefill-1"], named(pools, "prefill-1")
    with monkeypatch.context() as patch:
        prefer(patch, pools, "prefill-1")
        await pools.ask(image, image.facts[0].question)
    held = pools.frontend.node._directory
    key = next(e.key for e in pools.decodes[0].node.store.objects()[::-1])
    pools.decodes[0].node.store.clear()
    await pools.until(lambda: len(pools.directory.state.holders((ObjectKind.KV, key))) == 1)
    assert (await held.lookup([key]))[0].kv[0].worker_id == info.worker_id
    process.send(signal.SIGSTOP)
    try:
        answer = await pools.ask("A.\n", image, image.facts[1].question, prefill_worker="prefill-0")
    finally:
        process.send(signal.SIGCONT)
    assert (answer.text, answer.sources) == (image.facts[1].answer, ["computed"])
    assert answer.done.vlcache["retries"] == 0
    await asyncio.sleep(1.0)
    assert named(pools, "prefill-1"), "it has joined again"
    await pools.drained()


async def test_prefill_dies_behind_the_first_token(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the only holder of the picture's KV, too: the directory's hints are stale now."""
    image = picture(143)
    prompt = ("A farmer.\n", image, image.facts[0].question)
    prefer(monkeypatch, pools, "prefill-1")
    cold = await pools.ask(image, image.facts[0].question, max_tokens=1)
    assert cold.sources == ["computed"] and cold.done.vlcache["prefill_worker"] == "prefill-1"
    whole = await undisturbed(pools, *prompt)
    for worker in pools.workers:
        worker.node.store.clear()
    answer, done = [], None
    async for event in pools.events(*prompt, **LONG):
        if isinstance(event, Done):
            done = event
            continue
        if not answer:
            pools.processes["prefill-1"].kill()
        answer += spelled(event)
    assert done is not None and answer == whole
    assert done.vlcache["retries"] >= 1 and done.vlcache["prefill_worker"] == "prefill-0"
    await gone(pools, "prefill-1")


async def test_a_pool_that_is_gone_is_an_error_that_says_so(pools: Pools) -> None:
    await pools.decodes[0].node._directory.close()
    await pools.until(lambda: all(member.info.name != "decode-0" for member in pools.frontend.node.members()))
    with pytest.raises(WorkerLost, match="decode"):
        await pools.ask(picture(1), "?", ignore_eos=True)
    with pytest.raises(WorkerLost, match="decode"):
        await pools.frontend.health()
    await pools.drained()
