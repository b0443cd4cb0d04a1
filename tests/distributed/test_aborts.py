"""A client that goes away frees everything it held, wherever its request was."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from gates import Gate, cancel, start
from pools import Pools, picture

from vlcache_dist.errors import DeadlineExceeded, EngineError, StoreFull
from vlcache_dist.serve.chat import Delta
from vlcache_dist.types import ReuseMode

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Pools]:
    async with Pools() as pools:
        yield pools


@pytest_asyncio.fixture(loop_scope="module")
async def pools(shared: Pools) -> AsyncIterator[Pools]:
    yield shared
    await shared.drained()
    # Whatever happened, the next request works.
    image = picture(1)
    assert (await shared.ask(image, image.facts[0].question)).text == image.facts[0].answer
    await shared.drained()


@pytest.mark.parametrize("reuse", [ReuseMode.APPROX, ReuseMode.OFF])
async def test_while_encoding(pools: Pools, monkeypatch: pytest.MonkeyPatch, reuse: ReuseMode) -> None:
    encoder, image = pools.encoders[0], picture(2 if reuse is ReuseMode.OFF else 3)
    gate = Gate(encoder._tower.forward)
    monkeypatch.setattr(encoder._tower, "forward", gate)
    task = start(pools, image, image.facts[0].question, reuse=reuse)
    await pools.until(gate.reached.is_set)
    await asyncio.sleep(0.05)
    await cancel(task)
    gate.opened.set()


async def test_what_the_encoder_has_not_begun_is_not_encoded(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, first, second = pools.encoders[0], picture(4), picture(5)
    gate = Gate(encoder._tower.forward)
    monkeypatch.setattr(encoder._tower, "forward", gate)
    encoded = pools.encoded
    running = start(pools, first, first.facts[0].question)
    await pools.until(gate.reached.is_set)
    waiting = start(pools, second, second.facts[0].question)
    await pools.until(lambda: len(encoder._scheduler) == 1)
    await cancel(waiting)
    await pools.until(lambda: len(encoder._tasks) == 1)
    gate.opened.set()
    assert (await running).text == first.facts[0].answer
    assert pools.encoded - encoded == 1


async def test_others_who_want_the_same_picture_get_it(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to ask, whose bytes the encoder has, goes away; so does the producer of the KV."""
    encoder, image = pools.encoders[0], picture(6)
    gate = Gate(encoder._tower.forward)
    monkeypatch.setattr(encoder._tower, "forward", gate)
    encoded = pools.encoded
    first = start(pools, image, image.facts[0].question, prefill_worker="prefill-0")
    await pools.until(gate.reached.is_set)
    await pools.until(lambda: bool(pools.directory.state.stats()["claims"]))
    others = [
        start(pools, "The river.\n", image, image.facts[1].question, prefill_worker=f"prefill-{i}") for i in (0, 1)
    ]
    await asyncio.sleep(0.1)
    await cancel(first)
    gate.opened.set()
    assert [(await other).text for other in others] == [image.facts[1].answer] * 2
    assert pools.encoded - encoded == 1


async def test_the_pictures_bytes_come_from_whoever_is_left(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ingress of the first request has forgotten its media before the encoder asks for them."""
    encoder, image = pools.encoders[0], picture(7)
    source = pools.frontend._get_media
    asked = 0

    async def forgetful(message: Any, call: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            await asyncio.sleep(0.2)
            raise EngineError("gone")
        return await source(message, call)

    server = pools.frontend.node._server
    kind = next(kind for kind in server._handlers if kind.__name__ == "GetMedia")
    monkeypatch.setitem(server._handlers, kind, (forgetful, False))
    monkeypatch.setattr(pools.frontend, "_encode_ahead", lambda answer, ahead: None)  # which attaches the bytes
    options = {"reuse": ReuseMode.EXACT}  # each computes the picture's KV, from one encoder output
    answers = await asyncio.gather(
        *(start(pools, image, image.facts[0].question, prefill_worker=f"prefill-{i}", **options) for i in (0, 1))
    )
    assert [answer.text for answer in answers] == [image.facts[0].answer] * 2
    assert asked == 2 and not encoder._tasks


@pytest.mark.parametrize("deltas", [1, 2, 8])
async def test_behind_some_tokens(pools: Pools, deltas: int) -> None:
    image = picture(8)
    events = pools.events(image, image.facts[0].question, ignore_eos=True, max_tokens=200)
    seen = 0
    async for event in events:
        assert isinstance(event, Delta)
        seen += 1
        if seen == deltas:
            break
    await events.aclose()


async def test_while_it_is_handed_over(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, image = pools.decodes[0], picture(9)
    gate = Gate(type(decode.engine).import_sequence.__get__(decode.engine))
    monkeypatch.setattr(decode.engine, "import_sequence", gate)
    task = start(pools, image, image.facts[0].question)
    await pools.until(gate.reached.is_set)
    await cancel(task)
    await asyncio.sleep(0.05)
    gate.opened.set()


async def test_in_the_queue_of_a_busy_engine(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls into the engine that have not begun are cancelled with their request; nothing may get lost with them."""
    prefill, image = pools.prefills[0], picture(10)
    gate = Gate(type(prefill.engine).step.__get__(prefill.engine))
    monkeypatch.setattr(prefill.engine, "step", gate)
    options = {"prefill_worker": "prefill-0"}
    tasks = [start(pools, f"{i}.\n", image, image.facts[0].question, **options) for i in range(4)]
    await pools.until(gate.reached.is_set)
    await asyncio.sleep(0.1)
    for task in tasks[1:]:
        await cancel(task)
    await asyncio.sleep(0.1)
    gate.opened.set()
    assert (await tasks[0]).text == image.facts[0].answer


async def test_a_claim_given_up_is_taken_over_at_once(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, image = pools.prefills[0], picture(11)
    gate = Gate(type(prefill.engine).step.__get__(prefill.engine))
    producer = None
    with monkeypatch.context() as patch:
        patch.setattr(pools.encoders[0]._tower, "forward", blocked := Gate(pools.encoders[0]._tower.forward))
        producer = start(pools, image, image.facts[0].question, prefill_worker="prefill-0")
        await pools.until(lambda: bool(pools.directory.state.stats()["claims"]))
        waiter = start(pools, "The river.\n", image, image.facts[1].question, prefill_worker="prefill-1")
        await pools.until(lambda: bool(pools.directory._waiters))
        assert not gate.reached.is_set()
        await cancel(producer)
        blocked.opened.set()
        async with asyncio.timeout(5):
            answer = await waiter
    assert (answer.text, answer.sources) == (image.facts[1].answer, ["computed"])


async def test_at_any_moment(pools: Pools) -> None:
    """Many requests for few pictures, most of them given up at a random time; those that stay are right."""
    chance = random.Random(5)
    modes = [ReuseMode.APPROX, ReuseMode.APPROX, ReuseMode.EXACT, ReuseMode.OFF]

    async def one(number: int) -> None:
        image = picture(50 + number // 8)
        fact = chance.choice(image.facts)
        prefix = chance.choice(["", "The river.\n", "A farmer.\n"])
        task = start(pools, prefix, image, fact.question, reuse=chance.choice(modes))
        done, _ = await asyncio.wait({task}, timeout=chance.choice([0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 30]))
        if done:
            assert task.result().text == fact.answer
        else:
            await cancel(task)

    running: list[asyncio.Task[None]] = []
    for number in range(48):
        running.append(asyncio.create_task(one(number)))
        await asyncio.sleep(chance.choice([0, 0.02, 0.05]))
    await asyncio.gather(*running)


async def test_a_deadline_in_the_middle(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = pools.settings.serve.model_copy(update={"request_timeout_s": 0.3})
    image = picture(12)
    with monkeypatch.context() as patch:
        patch.setattr(pools.frontend, "_settings", pools.settings.model_copy(update={"serve": serve}))
        patch.setattr(pools.encoders[0]._tower, "forward", gate := Gate(pools.encoders[0]._tower.forward))
        with pytest.raises(DeadlineExceeded):
            await pools.ask(image, image.facts[0].question)
        gate.opened.set()
        await pools.drained()


async def test_a_full_store_at_the_handoff_is_waited_for(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(13)
    refusals = {"export": 2, "take": 2}

    def once_more(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if refusals[what]:
                refusals[what] -= 1
                raise StoreFull("no room")
            return function(*args, **kwargs)

        return call

    for prefill in pools.prefills:
        monkeypatch.setattr(prefill.engine, "export", once_more("export", prefill.engine.export))
    decode = pools.decodes[0]
    monkeypatch.setattr(decode.node, "fetch_staging", once_more("take", decode.node.fetch_staging))
    answer = await pools.ask(image, image.facts[0].question)
    assert answer.text == image.facts[0].answer and answer.done.vlcache["retries"] == 0
    assert refusals == {"export": 0, "take": 0}


async def test_a_handoff_that_does_not_fit_is_given_back(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(14)
    decode = pools.decodes[0]

    def refuse(request_id: str, first_token: int, kv: Any) -> None:
        raise ValueError("position 3 is neither shipped nor derivable")

    with monkeypatch.context() as patch:
        patch.setattr(decode.engine, "import_sequence", refuse)
        with pytest.raises(EngineError, match="position 3"):
            await pools.ask(image, image.facts[0].question)
    await pools.drained()


async def test_a_source_that_the_engine_refuses_is_given_back(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(15)

    def refuse(request_id: str, index: int, source: Any) -> None:
        raise ValueError("does not fit")

    for known in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(pools.prefills[0].engine, "provide", refuse)
            with pytest.raises(EngineError, match="does not fit"):
                await pools.ask("A.\n", image, image.facts[0].question, prefill_worker="prefill-0")
        await pools.drained()
        if not known:
            await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")


async def test_a_forward_pass_that_fails_ends_its_requests_only(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(16)
    with monkeypatch.context() as patch:

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the device said no")

        patch.setattr(pools.prefills[0].engine.runner, "launch", broken)
        with pytest.raises(EngineError, match="the device said no"):
            await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
    await pools.drained()
