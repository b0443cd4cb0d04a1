"""What a cache loses costs time, never an answer: stale hints, evictions, frozen holders, a directory that is gone."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import pytest
from pools import Pools, picture

from vlcache_dist.cache_directory.server import DirectoryServer
from vlcache_dist.errors import (
    ChecksumMismatch,
    LeaseLost,
    ObjectGone,
    StoreFull,
    TransferFailed,
    TransferTimeout,
    WorkerLost,
)
from vlcache_dist.types import ObjectKind, ReuseMode


async def test_stale_hints() -> None:
    """The holder has dropped the KV, then the encoder its output too, and the directory does not know it."""
    async with Pools() as pools:
        image = picture(1)
        for worker in pools.workers:
            worker.node._directory.retract = lambda *what: None
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
        key = pools.prefills[0].node.store.objects()[0].key
        for number, name in enumerate(["prefill-1", "prefill-0"]):
            assert pools.directory.state.holders((ObjectKind.KV, key))
            assert pools.directory.state.holders((ObjectKind.EMBEDDING, key))
            for worker in pools.workers:
                if number or worker is not pools.encoders[0]:
                    worker.node.store.clear()
            encoded = pools.encoded
            answer = await pools.ask(f"{number}.\n", image, image.facts[1].question, prefill_worker=name)
            assert (answer.text, answer.sources) == (image.facts[1].answer, ["computed"])
            assert pools.encoded - encoded == number
            await pools.drained()
        assert all(prefill.node._fetcher.failures["ObjectGone"] for prefill in pools.prefills)


async def test_evictions_under_pressure() -> None:
    """Stores that hold two or three pictures, eight pictures, and many requests at a time."""
    async with Pools(store_bytes=3 << 20) as pools:
        images = [picture(10 + i) for i in range(8)]
        for turn in range(2):
            answers = await asyncio.gather(
                *(pools.ask(f"{turn}.\n", image, image.facts[turn].question) for image in images)
            )
            assert [answer.text for answer in answers] == [image.facts[turn].answer for image in images]
        assert all(worker.node.store.stats().num_evictions for worker in pools.prefills)
        await pools.drained()


@pytest.mark.parametrize("failure", [StoreFull("no room"), TransferTimeout("too slow")])
async def test_kv_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    async with Pools() as pools:
        image = picture(2)
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
        node = pools.prefills[1].node
        fetch = node.fetch

        async def refuse(holder: Any, kind: ObjectKind, *args: Any, **options: Any) -> Any:
            if kind is ObjectKind.KV:
                raise failure
            return await fetch(holder, kind, *args, **options)

        monkeypatch.setattr(node, "fetch", refuse)
        answers = await asyncio.gather(
            *(pools.ask(f"{i}.\n", image, image.facts[1].question, prefill_worker="prefill-1") for i in range(3))
        )
        assert [answer.text for answer in answers] == [image.facts[1].answer] * 3
        assert [answer.sources for answer in answers] == [["computed"]] * 3
        await pools.drained()


async def test_the_directory_dies_and_comes_back_empty() -> None:
    async with Pools() as pools:
        first, second, third = picture(4), picture(5), picture(6)
        await pools.ask(first, first.facts[0].question, prefill_worker="prefill-0")
        objects = pools.directory.state.stats()["objects"]
        port = int(pools.directory.rpc.address.rpartition(":")[2])
        await pools.directory.close()
        # Without it every worker is on its own, and right.
        started = time.monotonic()
        answers = await asyncio.gather(
            pools.ask(second, second.facts[0].question, prefill_worker="prefill-0"),
            pools.ask(second, second.facts[1].question, prefill_worker="prefill-1"),
            pools.ask("A.\n", first, first.facts[1].question, prefill_worker="prefill-0"),
        )
        assert time.monotonic() - started < 20.0, "nobody waits for a directory that is gone"
        expected = [second.facts[0].answer, second.facts[1].answer, first.facts[1].answer]
        assert [answer.text for answer in answers] == expected
        assert answers[2].sources == ["local"]
        # Back again, it knows nothing for a moment; meanwhile everybody still knows everybody.
        pools.directory = DirectoryServer(expiry_s=2.0)
        await pools.directory.start(port)
        answer = await pools.ask(third, third.facts[0].question)
        assert answer.text == third.facts[0].answer
        await pools.until(lambda: pools.directory.state.stats()["members"] == 4)
        await pools.until(lambda: pools.directory.state.stats()["objects"] >= objects + 4)
        warm = await pools.ask("A.\n", second, second.facts[1].question, prefill_worker="prefill-1")
        assert warm.text == second.facts[1].answer and warm.sources != ["computed"]
        await pools.drained()


async def test_a_draining_worker_is_passed_by() -> None:
    """It refuses before the ingress has heard of it."""
    async with Pools() as pools:
        image = picture(7)
        prefill = pools.prefills[0]
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0", reuse=ReuseMode.OFF)
        prefill.node._draining = True
        answers = await asyncio.gather(*(pools.ask(f"{i}.\n", image, image.facts[1].question) for i in range(4)))
        assert [answer.text for answer in answers] == [image.facts[1].answer] * 4
        assert {answer.done.vlcache["prefill_worker"] for answer in answers} == {"prefill-1"}
        await pools.drained()


async def test_losses_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches that fail in every way, objects that vanish, requests that are given up: who stays is answered right."""
    chance = random.Random(3)
    errors = (StoreFull, ObjectGone, LeaseLost, TransferFailed, TransferTimeout, ChecksumMismatch, WorkerLost)
    async with Pools(store_bytes=6 << 20) as pools:
        for worker in [*pools.prefills, *pools.decodes]:
            fetch = worker.node._fetcher.fetch

            async def fails(*args: Any, fetch: Any = fetch, **options: Any) -> Any:
                if chance.random() < 0.2:
                    await asyncio.sleep(chance.choice([0, 0.01]))
                    raise chance.choice(errors)("at random")
                return await fetch(*args, **options)

            monkeypatch.setattr(worker.node._fetcher, "fetch", fails)

        async def forget() -> None:
            while True:
                await asyncio.sleep(0.02)
                store = chance.choice(pools.workers).node.store
                if objects := store.objects():
                    store.discard(chance.choice(objects))

        outcomes: Counter[str] = Counter()

        async def one(number: int) -> None:
            image = picture(60 + number % 7)
            fact = chance.choice(image.facts)
            prefix = chance.choice(["", "The river.\n", "A farmer.\n"])
            task = asyncio.create_task(pools.ask(prefix, image, fact.question))
            await asyncio.wait({task}, timeout=chance.choice([0.05, 0.2, 30, 30, 30]))
            if not task.done():
                task.cancel()
                outcomes["given up"] += 1
                await asyncio.wait({task})
                return
            error = task.exception()
            outcomes["answered" if error is None else type(error).__name__] += 1
            assert error is not None or task.result().text == fact.answer

        forgetting = asyncio.create_task(forget())
        running = []
        for number in range(60):
            running.append(asyncio.create_task(one(number)))
            await asyncio.sleep(0.03)
        await asyncio.gather(*running)
        forgetting.cancel()
        # Three attempts that all meet with misfortune end in the one error that says so.
        assert set(outcomes) <= {"answered", "given up", "WorkerLost"} and outcomes["answered"] > 15, outcomes
        await pools.drained()
