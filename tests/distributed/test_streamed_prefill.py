"""Warm prefill that starts while the image's KV is still on its way, through real workers: what arrives late, damaged
or not at all costs time, never an answer, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
from pools import Pools, picture

from vlcache_dist.errors import ChecksumMismatch, LeaseLost, TransferTimeout
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.prefill_workers.resolver import SpanResolver
from vlcache_dist.types import ObjectKind


def in_groups(pools: Pools) -> None:
    """Every worker reads KV in as many groups of layers as there can be."""
    for worker in pools.workers:
        worker.node._fetcher._limits = replace(worker.node._fetcher._limits, group_bytes=1)


def streamed(pools: Pools) -> tuple[int, int]:
    stats = pools.prefills[1].engine.stats()
    return stats.spans_streamed, stats.spans_revoked


def troubled(pools: Pools, monkeypatch: pytest.MonkeyPatch, trouble: Any) -> None:
    """``trouble(stop)`` is awaited in the reader's place before the group that ends at layer ``stop`` is told of; what
    it raises ends the fetch."""
    node = pools.prefills[1].node
    reader = node._fetcher._reader
    read = reader.read

    async def slow(peer: Any, extent: Extent, pieces: Any, deadlines: Any, landed: Any = None) -> None:
        if extent.kind is not ObjectKind.KV:
            return await read(peer, extent, pieces, deadlines, landed)
        await read(peer, extent, pieces, deadlines)
        try:
            for index in range(len(pieces)):
                await trouble(index)
                landed(index)
        except BaseException:
            node.store.abort(extent)
            raise

    monkeypatch.setattr(reader, "read", slow)


async def test_the_pass_starts_before_the_last_layers_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Pools() as pools:
        in_groups(pools)
        image = picture(21)
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
        expected = await pools.ask("A.\n", image, image.facts[1].question, prefill_worker="prefill-0")
        runner = pools.prefills[1].engine.runner
        layers = runner.model.run_layers
        seen: list[tuple[int, int]] = []

        def note(x: Any, batch: Any, pages: Any, arena: Any, start: int, stop: int) -> Any:
            seen.append((start, landed[0]))
            return layers(x, batch, pages, arena, start, stop)

        landed = [0]

        async def trouble(index: int) -> None:
            await asyncio.sleep(0.05)
            landed[0] = index + 1

        troubled(pools, monkeypatch, trouble)
        monkeypatch.setattr(runner.model, "run_layers", note)
        answer = await pools.ask("A.\n", image, image.facts[1].question, prefill_worker="prefill-1")
        assert (answer.text, answer.sources) == (expected.text, ["remote"])
        assert streamed(pools) == (1, 0)
        assert seen[0] == (0, 1), "the first layers were computed when only their group was here"
        await pools.drained()


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("error", [TransferTimeout("late"), LeaseLost("over"), ChecksumMismatch("damaged")], ids=repr)
async def test_what_fails_on_the_way_is_computed(monkeypatch: pytest.MonkeyPatch, at: int, error: Exception) -> None:
    async with Pools() as pools:
        in_groups(pools)
        image = picture(22)
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")

        async def trouble(index: int) -> None:
            await asyncio.sleep(0.03)
            if index == at:
                raise error

        troubled(pools, monkeypatch, trouble)
        answers = await asyncio.gather(
            *(pools.ask(f"{i}.\n", image, image.facts[1].question, prefill_worker="prefill-1") for i in range(2))
        )
        assert [answer.text for answer in answers] == [image.facts[1].answer] * 2
        assert "remote" not in [source for answer in answers for source in answer.sources]
        assert at == 0 or streamed(pools)[1] > 0
        await pools.drained()


async def test_damage_on_the_way_is_found_before_the_token_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are damaged in the reader's arena behind the READ; the pass is already computing on them."""
    async with Pools() as pools:
        in_groups(pools)
        image = picture(23)
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
        worker = pools.prefills[1]
        worker.node._fetcher._limits = replace(worker.node._fetcher._limits, verify_on_host=True)

        async def trouble(index: int) -> None:
            await asyncio.sleep(0.02)
            if index == 1:
                filling = [r.extent for r in worker.node.store._records.values() if r.state.value == "filling"]
                for extent in filling:
                    worker.node.arena.tensor[extent.offset : extent.offset + extent.elements // 2] = float("nan")

        troubled(pools, monkeypatch, trouble)
        answer = await pools.ask("A.\n", image, image.facts[1].question, prefill_worker="prefill-1")
        assert answer.text == image.facts[1].answer and answer.sources == ["computed"]
        assert set(worker.node._fetcher.failures) == {"ChecksumMismatch"}, "of every holder there is"
        assert streamed(pools)[0] == streamed(pools)[1] > 0
        await pools.drained()


async def test_requests_that_go_away_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Pools() as pools:
        in_groups(pools)
        image = picture(24)
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
        reached = asyncio.Event()

        async def trouble(index: int) -> None:
            if index == 1:
                reached.set()
                await asyncio.sleep(0.2)

        troubled(pools, monkeypatch, trouble)
        task = asyncio.create_task(pools.ask("A.\n", image, image.facts[1].question, prefill_worker="prefill-1"))
        await reached.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})
        await pools.drained()
        answer = await pools.ask("B.\n", image, image.facts[1].question, prefill_worker="prefill-1")
        assert (answer.text, answer.sources) == (image.facts[1].answer, ["remote"])
        await pools.drained()


async def test_two_pictures_in_both_orders_with_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are withdrawn at random groups while the same pictures are wanted in opposite orders."""
    chance = random.Random(5)
    async with Pools() as pools:
        in_groups(pools)
        images = [picture(25), picture(26)]
        for image in images:
            await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")

        async def trouble(index: int) -> None:
            await asyncio.sleep(chance.uniform(0, 0.02))
            if chance.random() < 0.15:
                raise chance.choice((TransferTimeout, LeaseLost, ChecksumMismatch))("at random")

        troubled(pools, monkeypatch, trouble)
        for turn in range(6):
            node = pools.prefills[1].node
            for extent in node.store.objects():
                node.store.discard(extent)
            answers = await asyncio.gather(
                *(
                    pools.ask(f"{turn}.{n}\n", *order, order[1].facts[1].question, prefill_worker="prefill-1")
                    for n, order in enumerate([images, images[::-1], images])
                )
            )
            assert all(answer.text for answer in answers)
        assert all(count > 0 for count in streamed(pools))
        await pools.drained()


async def test_what_was_fetched_ahead_came_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head start may be over before the engine asks for a source; the answer must not call that the own store."""
    run = SpanResolver.run

    async def late(self: SpanResolver, needed: Any) -> None:
        if self._heading is not None:
            await self._heading
        while not all(arrival.kv.over for arrival in self._ahead.values()):  # noqa: ASYNC110 - it sets no event
            await asyncio.sleep(0.01)
        await run(self, needed)

    async with Pools() as pools:
        image = picture(22)
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
        monkeypatch.setattr(SpanResolver, "run", late)
        answer = await pools.ask("A.\n", image, image.facts[1].question, prefill_worker="prefill-1")
        assert answer.sources == ["remote"]
        again = await pools.ask("B.\n", image, image.facts[1].question, prefill_worker="prefill-1")
        assert again.sources == ["local"] and again.text == answer.text
        await pools.drained()


async def test_a_remote_hit_asks_the_directory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ingress does; the worker goes to the holder that it was told of, and to the directory only if that is old
    news."""
    async with Pools() as pools:
        image = picture(24)
        await pools.ask(image, image.facts[0].question, prefill_worker="prefill-0")
        node = pools.prefills[1].node
        asked: list[bytes] = []
        lookup = node._directory.lookup

        async def noted(keys: Any) -> Any:
            asked.extend(keys)
            return await lookup(keys)

        monkeypatch.setattr(node._directory, "lookup", noted)
        answer = await pools.ask("A.\n", image, image.facts[1].question, prefill_worker="prefill-1")
        assert (answer.text, answer.sources) == (image.facts[1].answer, ["remote"]) and not asked
        for extent in node.store.objects():
            node.store.discard(extent)
        for worker in pools.workers:  # the decode worker has a copy by now
            found = worker.node.store.lookup

            def gone(kind: ObjectKind, *arguments: Any, found: Any = found, **options: Any) -> Extent | None:
                return None if kind is ObjectKind.KV else found(kind, *arguments, **options)

            monkeypatch.setattr(worker.node.store, "lookup", gone)  # the directory does not know yet
        answer = await pools.ask("B.\n", image, image.facts[2].question, prefill_worker="prefill-1")
        assert (answer.text, answer.sources) == (image.facts[2].answer, ["computed"]) and asked
        await pools.drained()
