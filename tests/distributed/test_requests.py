"""Requests through encoder, prefill and decode pools: what is computed once, what moves once, and right answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from pools import Pools, picture

from vlcache_dist.errors import BadRequest, DeadlineExceeded, InvalidMedia
from vlcache_dist.types import FinishReason, ReuseMode

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Pools]:
    async with Pools() as pools:
        yield pools


@pytest_asyncio.fixture(loop_scope="module")
async def pools(shared: Pools) -> AsyncIterator[Pools]:
    yield shared
    await shared.drained()


async def test_an_image_is_reused_at_the_other_prefill_worker(pools: Pools) -> None:
    image = picture(1)
    fact, other = image.facts[:2]
    cold = await pools.ask(image, fact.question, prefill_worker="prefill-0")
    assert (cold.text, cold.sources, cold.done.cached_tokens) == (fact.answer, ["computed"], 0)
    rows = pools.rows
    warm = await pools.ask("The river.\n", image, other.question, prefill_worker="prefill-1")
    assert (warm.text, warm.sources) == (other.answer, ["remote"])
    (about,) = warm.images
    assert (about["reused_tokens"], about["recomputed_tokens"]) == (61, 3)
    layout = pools.prefills[1].node.layout
    assert about["bytes_moved"] == layout.kv_elements(64) * layout.itemsize
    assert about["holder"] == pools.prefills[0].node.worker_id
    assert pools.rows - rows == warm.done.prompt_tokens - 61
    again = await pools.ask("A farmer.\n", image, fact.question, prefill_worker="prefill-1")
    assert (again.text, again.sources) == (fact.answer, ["local"])


async def test_ten_first_requests_cost_one_encode_and_one_vision_prefill(pools: Pools) -> None:
    image = picture(2)
    encoded, recorded, rows, read = pools.encoded, pools.recorded, pools.rows, pools.bytes_read
    facts = [image.facts[i % len(image.facts)] for i in range(10)]
    prefixes = [f"{word} finds the river.\n" for word in "ABCDEFGHIJ"]
    answers = await asyncio.gather(
        *(
            pools.ask(prefix, image, fact.question, prefill_worker=f"prefill-{i % 2}")
            for i, (prefix, fact) in enumerate(zip(prefixes, facts, strict=True))
        )
    )
    assert [answer.text for answer in answers] == [fact.answer for fact in facts]
    assert pools.encoded - encoded == 1
    assert pools.recorded - recorded == 1
    sources = sorted(source for answer in answers for source in answer.sources)
    assert sources.count("computed") == 1 and "local" in sources and "remote" in sources
    layout = pools.prefills[0].node.layout
    once = (layout.kv_elements(64) + 2 * layout.embedding_elements(64)) * layout.itemsize
    assert pools.bytes_read - read <= 1.5 * once, "the KV was read once, whoever used it"
    assert pools.rows - rows == sum(answer.done.prompt_tokens - answer.done.cached_tokens for answer in answers)


@pytest.mark.parametrize("workers", [("prefill-0", "prefill-1"), ("prefill-0", "prefill-0")])
async def test_the_same_images_in_opposite_order_do_not_wait_for_each_other(
    pools: Pools, workers: tuple[str, str]
) -> None:
    seed = 10 if workers[0] == workers[1] else 20
    a, b = picture(seed), picture(seed + 1)
    encoded = pools.encoded
    orders = [(a, b), (b, a)] * 3
    asked = [
        pools.ask("Picture 1: ", first, "\nPicture 2: ", second, "In picture 1, what is there?", prefill_worker=worker)
        for (first, second), worker in zip(orders, workers * 3, strict=True)
    ]
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*asked)
    assert all(answer.done.finish in FinishReason for answer in answers)
    assert pools.encoded - encoded == 2


async def test_decode_never_fetches_an_image_twice(pools: Pools) -> None:
    image = picture(3)
    decode = pools.decodes[0]
    layout = decode.node.layout
    before = decode._images_fetched
    first = await pools.ask(image, image.facts[0].question)
    assert first.done.vlcache["handoff_images"] == 1 == decode._images_fetched - before
    text = first.done.prompt_tokens - 64
    assert first.done.vlcache["handoff_bytes"] == layout.kv_elements(64 + text) * layout.itemsize
    for number in range(3):
        answer = await pools.ask(f"The {number}.\n", image, image.facts[1].question, plan="uniform:5")
        assert answer.done.vlcache["handoff_images"] == 0
        shipped = answer.done.prompt_tokens - 60
        assert answer.done.vlcache["handoff_bytes"] == layout.kv_elements(shipped) * layout.itemsize
    assert decode._images_fetched - before == 1


async def test_pages_at_decode_are_those_of_prefill(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    def pages(engine: Any, sequence: Any) -> torch.Tensor:
        slots = torch.from_numpy(sequence.slots(0, sequence.num_prompt).copy())
        size = engine.config.block_size
        return engine.runner.pages[:, :, slots // size, slots % size].clone()

    sent: dict[str, torch.Tensor] = {}
    taken: dict[str, torch.Tensor] = {}
    for prefill in pools.prefills:

        def release(request_id: str, engine: Any = prefill.engine) -> bool:
            if request_id in engine._parked:
                sent[request_id] = pages(engine, engine._parked[request_id])
            return type(engine).release(engine, request_id)

        monkeypatch.setattr(prefill.engine, "release", release)
    engine: Any = pools.decodes[0].engine

    def import_sequence(request_id: str, first_token: int, kv: Any) -> None:
        type(engine).import_sequence(engine, request_id, first_token, kv)
        taken[request_id] = pages(engine, engine._sequences[request_id])

    monkeypatch.setattr(engine, "import_sequence", import_sequence)
    a, b = picture(4), picture(5)
    await pools.ask(a, a.facts[0].question, prefill_worker="prefill-0")
    await pools.ask("The river.\n", a, a.facts[0].question, prefill_worker="prefill-1")
    await pools.ask("Picture 1: ", b, "\nPicture 2: ", a, "What is there?", prefill_worker="prefill-0")
    await pools.ask("No picture at all?", prefill_worker="prefill-0")
    await pools.until(lambda: len(sent) == len(taken) == 4)
    for request_id, theirs in sent.items():
        assert torch.equal(theirs, taken[request_id]), request_id


async def test_exact_reuses_prefixes_only(pools: Pools) -> None:
    image = picture(6)
    fact, other = image.facts[:2]
    where: dict[str, Any] = {"prefill_worker": "prefill-0", "reuse": ReuseMode.EXACT}
    first = await pools.ask(image, fact.question, **where)
    same = await pools.ask(image, other.question, **where)
    moved = await pools.ask("The river.\n", image, fact.question, **where)
    assert [first.text, same.text, moved.text] == [fact.answer, other.answer, fact.answer]
    assert [first.sources, same.sources, moved.sources] == [["computed"], ["prefix"], ["computed"]]
    assert same.done.cached_tokens >= 64 > moved.done.cached_tokens


async def test_off_shares_nothing_and_leaves_nothing(pools: Pools) -> None:
    image = picture(7)
    fact = image.facts[0]
    await pools.ask(image, fact.question, prefill_worker="prefill-0")
    objects = [len(worker.node.store.objects()) for worker in pools.workers]
    known = pools.directory.state.stats()["objects"]
    encoded = pools.encoded
    answer = await pools.ask(image, fact.question, prefill_worker="prefill-0", reuse=ReuseMode.OFF)
    assert (answer.text, answer.sources, answer.done.cached_tokens) == (fact.answer, ["computed"], 0)
    assert pools.encoded - encoded == 1
    await pools.until(lambda: [len(worker.node.store.objects()) for worker in pools.workers] == objects)
    assert pools.directory.state.stats()["objects"] == known


async def test_tenants_do_not_share(pools: Pools) -> None:
    image = picture(8)
    fact = image.facts[0]
    encoded = pools.encoded
    mine = await pools.ask(image, fact.question, tenant="a")
    theirs = await pools.ask(image, fact.question, tenant="b")
    assert (mine.sources, theirs.sources) == (["computed"], ["computed"])
    assert theirs.done.cached_tokens == 0 and pools.encoded - encoded == 2


@pytest.mark.parametrize("data", [b"nonsense", picture(9).png()[:300]], ids=["no picture", "cut"])
async def test_a_bad_picture_fails_alone(pools: Pools, data: bytes) -> None:
    good = picture(9)
    bad, fine = await asyncio.gather(
        pools.ask(data, "What is there?"), pools.ask(good, good.facts[0].question), return_exceptions=True
    )
    assert isinstance(bad, InvalidMedia), bad
    assert not isinstance(fine, BaseException) and fine.text == good.facts[0].answer


async def test_a_full_queue_of_requests_is_answered(pools: Pools) -> None:
    images = [picture(30 + i % 4) for i in range(24)]
    answers = await asyncio.gather(*(pools.ask(image, image.facts[0].question) for image in images))
    assert [answer.text for answer in answers] == [image.facts[0].answer for image in images]


async def test_stop_strings_end_the_request_everywhere(pools: Pools) -> None:
    image = picture(3)
    whole = await pools.ask(image, image.facts[0].question, ignore_eos=True, max_tokens=60)
    end = whole.text[1]
    cut = await pools.ask(image, image.facts[0].question, ignore_eos=True, max_tokens=60, stop=(end,))
    assert cut.text == whole.text[: whole.text.index(end)]
    assert cut.done.finish is FinishReason.STOP


async def test_an_unknown_worker_is_refused(pools: Pools) -> None:
    with pytest.raises(BadRequest, match="prefill-7"):
        await pools.ask(picture(1), "?", prefill_worker="prefill-7")


async def test_a_request_ends_at_its_deadline(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = pools.settings.serve.model_copy(update={"request_timeout_s": 0.4})
    monkeypatch.setattr(pools.frontend, "_settings", pools.settings.model_copy(update={"serve": serve}))
    with pytest.raises(DeadlineExceeded):
        await pools.ask(picture(40), "What is there?", ignore_eos=True, max_tokens=400)
