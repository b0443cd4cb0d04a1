"""Whose image KV is shared: of the first request, or of a context that says nothing of anybody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pools import Pools, picture

from vlcache_dist import wire
from vlcache_dist.errors import StoreFull
from vlcache_dist.kv.object_store import Extent
from vlcache_dist.prefill_workers import idle
from vlcache_dist.prefill_workers.donors import Donors
from vlcache_dist.types import KVSource, MediaSpan, ObjectKind, ReuseMode, SamplingParams

SECRETS = "The code word is QF. A river runs by.\n", "The code word is ZK. Nobody is there.\n"


def kv_objects(pools: Pools) -> list[tuple[Any, Extent]]:
    return [(w, e) for w in pools.prefills for e in w.node.store.objects() if e.kind is ObjectKind.KV]


def contents(worker: Any, extent: Extent) -> torch.Tensor:
    return worker.node.arena.tensor[extent.offset : extent.offset + extent.elements].clone()


async def recorded_for(pools: Pools, tenants: Sequence[str]) -> list[torch.Tensor]:
    """The KV objects that two tenants leave who show the same picture behind prompts of their own."""
    image, found, seen = picture(3), [], set()
    for tenant, secret in zip(tenants, SECRETS, strict=True):
        fact = image.facts[0]
        answer = await pools.ask(secret, image, fact.question, tenant=tenant)
        assert answer.text == fact.answer
        await pools.until(lambda: len(kv_objects(pools)) > len(seen))
        await pools.drained()
        ((worker, extent),) = [(w, e) for w, e in kv_objects(pools) if e.key not in seen]
        seen.add(extent.key)
        found.append(contents(worker, extent))
    return found


@pytest.mark.parametrize("policy", ["first", "canonical", "background"])
async def test_what_the_shared_kv_says_of_the_prompt(policy: str) -> None:
    """A first request's KV says something of its prompt; the canonical one is the same to the last bit."""
    async with Pools(prefills=1, donors=policy) as pools:
        one, other = await recorded_for(pools, ["a", "b"])
        assert torch.equal(one, other) == (policy != "first")


@pytest.mark.parametrize("policy", ["canonical", "background"])
async def test_who_reuses_it(policy: str) -> None:
    async with Pools(prefills=2, donors=policy) as pools:
        image = picture(5)
        first = await pools.ask("A farmer.\n", image, image.facts[0].question, prefill_worker="prefill-0")
        assert first.text == image.facts[0].answer
        assert first.sources == ["local" if policy == "canonical" else "computed"]
        await pools.until(lambda: pools.recorded == 1)
        await pools.drained()
        answers = await asyncio.gather(
            *(
                pools.ask(f"{name}.\n", image, image.facts[1].question, prefill_worker=name)
                for name in ("prefill-0", "prefill-1")
            )
        )
        assert [answer.text for answer in answers] == [image.facts[1].answer] * 2
        assert [answer.sources for answer in answers] == [["local"], ["remote"]]
        exact = await pools.ask("Z.\n", image, image.facts[2].question, reuse=ReuseMode.EXACT)
        assert (exact.text, exact.sources) == (image.facts[2].answer, ["computed"])
        assert pools.recorded == 1, "nothing but the canonical context is recorded"
        await pools.drained()
        assert [w.donors.status()["recorded"] for w in pools.prefills] == [1, 0]


async def test_the_canonical_prompt_itself_is_a_donor() -> None:
    async with Pools(prefills=1, donors="canonical") as pools:
        image = picture(6)
        answer = await pools.ask(image, image.facts[0].question)
        assert (answer.text, answer.sources) == (image.facts[0].answer, ["computed"])
        assert pools.recorded == 1 and pools.prefills[0].donors.status()["recorded"] == 0
        await pools.drained()


async def test_a_donor_that_cannot_be_recorded_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Pools(prefills=1, donors="canonical") as pools:
        image, node = picture(7), pools.prefills[0].node
        monkeypatch.setattr(node, "begin", _no_room)
        answer = await pools.ask("A river.\n", image, image.facts[0].question)
        assert (answer.text, answer.sources) == (image.facts[0].answer, ["computed"])
        await pools.drained()


def _no_room(*what: Any) -> Any:
    raise StoreFull("no room")


async def test_the_background_waits_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come first, for as long as there is patience."""
    monkeypatch.setattr(idle, "PATIENCE_S", 0.3)
    busy = SimpleNamespace(running=1, waiting=0)
    recorded: list[str] = []

    async def record(message: wire.Prefill) -> None:
        recorded.append(message.generation.request_id)

    async def nothing(key: bytes) -> wire.KeyState:
        return wire.KeyState(key, None)

    node = SimpleNamespace(store=SimpleNamespace(lookup=lambda kind, key: None), state=nothing)
    donors = Donors(node, lambda: busy, record)  # type: ignore[arg-type]
    running = asyncio.create_task(donors.run())
    try:
        donors.note(*_answered("one"))
        await asyncio.sleep(0.15)
        assert not recorded and donors.status()["pending"] == 1
        busy.running = 0
        await asyncio.sleep(0.15)
        assert recorded == ["one~donor0"]
        busy.running = 1
        donors.note(*_answered("two"))
        await asyncio.sleep(0.6)
        assert recorded == ["one~donor0", "two~donor0"], "a worker that is always busy reuses, too"
    finally:
        running.cancel()


def _answered(name: str) -> tuple[wire.Prefill, list[Any]]:
    span = MediaSpan(name.encode() * 4, 3, 4, (1, 4, 4), "image", 0.0, 0)
    generation = wire.Generation(
        name, "", (5, 6, 7, 9, 9, 9, 9, 8), (span,), SamplingParams(max_tokens=3), ReuseMode.APPROX, "none"
    )
    donor = wire.DonorContext((1, 2), (3,), ahead=False)
    message = wire.Prefill(generation, wire.MediaSource("tcp://127.0.0.1:9", "x"), 1.0, (), donor)
    return message, [SimpleNamespace(source=KVSource.COMPUTED)]
