"""A client that goes away while the canonical context is recorded ahead of its request (``donors=canonical``)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Container
from typing import Any

import pytest
import pytest_asyncio
import torch
from gates import Gate, cancel, start
from pools import Pools, picture

from vlcache_dist.types import ObjectKind

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def canonical() -> AsyncIterator[Pools]:
    async with Pools(donors="canonical") as pools:
        yield pools


def kv_of(pools: Pools) -> dict[bytes, torch.Tensor]:
    """The KV objects in the prefill workers' stores by content key, copies of one counted once."""
    return {
        extent.key: worker.node.arena.tensor[extent.offset : extent.offset + extent.elements].clone()
        for worker in pools.prefills
        for extent in worker.node.store.objects()
        if extent.kind is ObjectKind.KV
    }


def at_work(worker: Any) -> list[str]:
    """``donor0``: the worker's own request for the first picture of another; empty: anybody's request."""
    return [name.partition("~")[2] for name in worker._resolvers]


async def left(pools: Pools, before: Container[bytes]) -> list[torch.Tensor]:
    """KV objects that came since, when all is quiet."""
    await pools.drained()
    return [kv for key, kv in kv_of(pools).items() if key not in before]


async def canonical_from_now_on(
    pools: Pools, seed: int, before: Container[bytes], *, recorded: int, where: str = "prefill-0"
) -> None:
    """The next request for a picture answers right and finds its canonical KV, for which ``recorded`` more recordings
    are needed: to the last bit what is recorded for somebody else, who shares nothing."""
    image, count = picture(seed), pools.recorded
    answer = await pools.ask("The river.\n", image, image.facts[1].question, prefill_worker=where)
    assert (answer.text, answer.sources) == (image.facts[1].answer, ["local"])
    assert pools.recorded - count == recorded
    (found,) = await left(pools, before)
    before = kv_of(pools)
    answer = await pools.ask("A farmer.\n", image, image.facts[0].question, tenant="other")
    assert answer.text == image.facts[0].answer
    (undisturbed,) = await left(pools, before)
    assert torch.equal(found, undisturbed)


async def test_while_its_picture_is_encoded_for_the_donor(canonical: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was computed yet: the recording is given up, and the next request orders it again."""
    pools, image, before = canonical, picture(20), kv_of(canonical)
    with monkeypatch.context() as patch:
        patch.setattr(pools.encoders[0]._tower, "forward", gate := Gate(pools.encoders[0]._tower.forward))
        task = start(pools, "A.\n", image, image.facts[0].question, prefill_worker="prefill-0")
        await pools.until(gate.reached.is_set)
        await pools.until(lambda: bool(pools.directory.state.stats()["claims"]))
        assert at_work(pools.prefills[0]) == ["donor0"]
        await cancel(task)
        await pools.until(lambda: not at_work(pools.prefills[0]))
        gate.opened.set()
        assert not await left(pools, before)
    await canonical_from_now_on(pools, 20, before, recorded=1)


async def test_while_the_donor_is_computed(canonical: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that records is under way: what it brings is the canonical KV to the last bit."""
    pools, image, before = canonical, picture(21), kv_of(canonical)
    runner = pools.prefills[0].engine.runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "launch", gate := Gate(runner.launch))
        task = start(pools, "A.\n", image, image.facts[0].question, prefill_worker="prefill-0")
        await pools.until(gate.reached.is_set)
        assert at_work(pools.prefills[0]) == ["donor0"]
        await cancel(task)
        await asyncio.sleep(0.05)
        gate.opened.set()
        assert len(await left(pools, before)) == 1
    await canonical_from_now_on(pools, 21, before, recorded=0)


@pytest.mark.parametrize("where", ["prefill-0", "prefill-1"])
async def test_who_waits_for_a_donor_that_is_given_up(
    canonical: Pools, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Somebody else's request, here or on another worker, waits for the recording: it computes instead, and has the
    donor recorded behind its back."""
    pools, seed = canonical, 22 + int(where[-1])
    image, before, recorded, worker = picture(seed), kv_of(pools), pools.recorded, pools.prefills[int(where[-1])]
    with monkeypatch.context() as patch:
        patch.setattr(pools.encoders[0]._tower, "forward", gate := Gate(pools.encoders[0]._tower.forward))
        first = start(pools, "A.\n", image, image.facts[0].question, prefill_worker="prefill-0")
        await pools.until(gate.reached.is_set)
        await pools.until(lambda: bool(pools.directory.state.stats()["claims"]))
        other = start(pools, "B.\n", image, image.facts[1].question, prefill_worker=where)
        await pools.until(lambda: "" in at_work(worker))
        await cancel(first)
        await pools.until(lambda: "donor0" not in at_work(pools.prefills[0]))
        gate.opened.set()
        answer = await other
    assert (answer.text, answer.sources) == (image.facts[1].answer, ["computed"])
    await pools.until(lambda: pools.recorded == recorded + 1)
    await pools.drained()
    await canonical_from_now_on(pools, seed, before, recorded=0, where=where)


async def test_at_any_moment_of_a_donor(canonical: Pools) -> None:
    """Whenever the client goes, every recording is whole and canonical or not there at all."""
    pools, chance = canonical, random.Random(7)
    for seed in range(30, 40):
        image, before = picture(seed), kv_of(pools)
        task = start(pools, "A.\n", image, image.facts[0].question, prefill_worker="prefill-0")
        done, _ = await asyncio.wait({task}, timeout=chance.choice([0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12]))
        if done:
            assert task.result().text == image.facts[0].answer
        else:
            await cancel(task)
        kept = len(await left(pools, before))
        await canonical_from_now_on(pools, seed, before, recorded=1 - kept)
    assert sum(prefill.donors.status()["skipped"] for prefill in pools.prefills) == 0, "given up, not failed"
