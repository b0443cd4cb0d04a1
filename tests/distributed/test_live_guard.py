"""The guard in a running system: a plan that fails is noticed and switched off; contexts are remembered."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from pools import Answer, Pools, picture

from vlcache_dist.demo.pictures import Picture, draw
from vlcache_dist.reuse.books import Shadow
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.types import ReuseMode

pytestmark = pytest.mark.asyncio
SEEDS = range(22, 34)
WATCHED = "none+canary:0,3,5<0.5"


def guard(pools: Pools) -> dict[str, Any]:
    return pools.prefills[0].shadows.status()


async def alone(pools: Pools, seed: int, **options: Any) -> Answer:
    return await pools.ask(picture(seed), picture(seed).facts[0].question, **options)


async def second_of_two(pools: Pools, first: int, second: int, before: str = "", **options: Any) -> Answer:
    question = picture(second).facts[0].question
    asked = f"In picture 2, {question[0].lower()}{question[1:]}"
    return await pools.ask(f"{before}Picture 1: ", picture(first), "\nPicture 2: ", picture(second), asked, **options)


@functools.cache
def shapes(seed: int) -> Picture:
    return draw("shapes", seed=seed)


def place(row: int) -> str:
    return f"What is at row {row}, column 1?"


def truth(seed: int, row: int) -> str:
    return next(fact.answer for fact in shapes(seed).facts if fact.question == place(row))


async def ruled(pools: Pools, seed: int, **options: Any) -> Answer:
    """The rule stands before the picture and concerns its tokens: KV recorded without it says what is at the top."""
    return await pools.ask("Rows are counted from the bottom.\n", shapes(seed), place(1), **options)


async def test_an_injected_bad_plan_is_switched_off_and_only_where_it_fails() -> None:
    """Reuse without any recomputation, pictures recorded without the rule that they are asked under: nearly all
    answers are wrong. The same plan is right for pairs of pictures that keep their places."""
    async with Pools(prefills=1, guard_budget=0.02, guard_sampling=1.0) as pools:
        for seed in SEEDS:
            await pools.ask(shapes(seed), place(1), reuse=ReuseMode.EXACT, max_tokens=1)
        wrong = 0
        for seed in SEEDS:
            answer = await ruled(pools, seed, plan="none", max_tokens=6)
            wrong += answer.text != truth(seed, 4)
            await pools.until(lambda: not guard(pools)["pending"])
            await pools.drained()
        books = guard(pools)["formats"]["1 picture"]
        assert wrong > 0 and books["missed_alarms"] >= 2
        assert books["level"] == "off", books
        assert books["trips"] == 1 and books["kl"] > 1

        last = await ruled(pools, SEEDS[0], plan="none", max_tokens=6)
        assert last.text == truth(SEEDS[0], 4)
        assert last.done.vlcache["guard"] == "off"
        assert guard(pools)["shadows"]["in_line"] >= 1, "at off, reuse is tried in line and compared"

        await second_of_two(pools, 20, 21, reuse=ReuseMode.EXACT, max_tokens=1)
        two = await second_of_two(pools, 20, 21, plan="none", before="A stone.\n")
        assert two.done.vlcache["guard"] == "normal" and two.sources == ["local"] * 2
        assert two.text == picture(21).facts[0].answer
        await pools.drained()


async def test_shadows_share_nothing_and_leave_nothing() -> None:
    """Answers, logprobs and what stores and caches hold are the same with and without shadows."""
    seen = []
    for sampling in (0.0, 1.0):
        async with Pools(prefills=1, guard_budget=0.02, guard_sampling=sampling) as pools:
            answers = [await alone(pools, seed, logprobs=n) for seed, n in ((40, None), (41, 2))]
            answers += [
                await pools.ask("A stone.\n", picture(40), picture(40).facts[1].question, logprobs=n) for n in (None, 2)
            ]
            await pools.until(lambda pools=pools: not guard(pools)["pending"])
            await pools.drained()
            assert guard(pools)["shadows"]["runs"] == (1 if sampling else 0) + (1 if sampling else 0)
            objects = pools.prefills[0].node.store.stats().num_objects
            seen.append(([a.text for a in answers], [a.done.cached_tokens for a in answers], objects))
    assert seen[0] == seen[1]


async def test_a_harmful_pattern_is_remembered() -> None:
    """After two alarms in a context, the third picture in it is computed at once: no warm pass, and it is said why."""
    async with Pools(prefills=1) as pools:
        whys = []
        for first, second in ((50, 51), (52, 53), (54, 55)):
            await alone(pools, first)
            await alone(pools, second)
            answer = await second_of_two(pools, first, second, plan=WATCHED)
            assert answer.text == picture(second).facts[0].answer
            whys.append([image["why"] for image in answer.images])
        assert whys[0][1] in ("canary", "earlier span") and whys[1][1] in ("canary", "earlier span")
        assert whys[2][1] == "remembered"
        other = await second_of_two(pools, 54, 55, plan=WATCHED, tenant="somebody else")
        assert "remembered" not in [image["why"] for image in other.images]
        await pools.drained()


def levels(pools: Pools, format_: str) -> list[str]:
    return [p.shadows.status()["formats"].get(format_, {}).get("level", "") for p in pools.prefills]


async def test_workers_keep_common_books() -> None:
    """Requests take turns at two workers. What is seen at one counts at both; a worker that is started again, and a
    directory that lost everything, take up the level; clean runs, half of them at each, lead back."""
    name = "1 picture"
    async with Pools(prefills=2, guard_budget=0.02, guard_sampling=1.0, serve={"placement": "round-robin"}) as pools:
        for seed in SEEDS:
            await pools.ask(shapes(seed), place(1), reuse=ReuseMode.EXACT, max_tokens=1)
        for seed in SEEDS:
            for _ in range(2):  # one at each
                await ruled(pools, seed, plan="none", max_tokens=1)
            await pools.until(lambda: not any(p.shadows.status()["pending"] for p in pools.prefills))
            if "off" in levels(pools, name):
                break
        await pools.until(lambda: levels(pools, name) == ["off", "off"])

        def agree() -> bool:
            books = [p.shadows.status()["formats"][name] for p in pools.prefills]
            seen = [b["own"]["shadows"] for b in books]
            return all(seen) and all(b["shadows"] == sum(seen) and b["workers"] == 2 for b in books)

        await pools.until(agree)

        await pools.prefills.pop().close()
        pools.prefills.append(await pools.start_worker("prefill", 1))
        assert levels(pools, name) == ["off", "off"], "before its first request"

        await pools.restart_directory()
        await pools.until(lambda: [{name: "off"}] == list(pools.directory.guard_books.stats().values()))

        while levels(pools, name) == ["off", "off"]:  # 65 clean runs are enough, more if trials at off were harmed
            for worker in pools.prefills:
                for _ in range(20):
                    worker.shadows.guard.observe(name, Plan.parse("none"), Shadow(0.0, True, True))
            await pools.until(lambda: not any(p.shadows.status()["untold"] for p in pools.prefills))
        await pools.until(lambda: levels(pools, name) == ["strengthened"] * 2)
        await pools.drained()
