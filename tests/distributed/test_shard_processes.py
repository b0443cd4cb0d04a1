"""Tensor-parallel workers whose followers are processes, over NIXL; and what becomes of a worker that loses one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pools import Pools, picture

from vlcache_dist.errors import WorkerLost
from vlcache_dist.parallel.runner import ShardedRunner


def followers(worker: Any) -> list[Any]:
    runner = worker.engine.runner
    assert isinstance(runner, ShardedRunner)
    return runner._group._handles


async def test_shards_fetch_through_nixl_and_a_killed_follower_ends_its_worker_alone() -> None:
    async with Pools(prefills=2, decodes=0, tensor_parallel=2, serve={"decodes": 0}) as pools:
        image = picture(1)
        fact, other = image.facts[:2]
        cold = await pools.ask(image, fact.question, prefill_worker="prefill-0")
        assert (cold.text, cold.sources) == (fact.answer, ["computed"])
        warm = await pools.ask("The river.\n", image, other.question, prefill_worker="prefill-1")
        assert (warm.text, warm.sources) == (other.answer, ["remote"])
        await pools.drained()

        lost, left = pools.prefills
        pids = [handle._process.pid for handle in followers(lost)]
        asked = [
            asyncio.create_task(pools.ask(f"{word} finds it.\n", image, fact.question)) for word in ("A", "B", "C", "D")
        ]
        # Placement may have sent all of them elsewhere; then it dies idle.
        await pools.until(lambda: lost.engine.stats().running > 0 or all(task.done() for task in asked))
        followers(lost)[0].kill()
        await pools.until(lambda: not lost.node.healthy)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [a if isinstance(a, BaseException) else a.text for a in answers] == [fact.answer] * 4
        assert left.node.healthy
        assert all(handle.wait(5.0) for handle in followers(lost)), pids
        await pools.until(lambda: any(m.info.draining for m in pools.frontend.node.members()))
        with pytest.raises(WorkerLost, match="tensor-parallel worker: "):
            await asyncio.wait_for(lost._bridge.call(lambda engine: engine.stats()), 5.0)
        again = await pools.ask("E finds it.\n", image, fact.question)
        assert (again.text, again.done.vlcache["prefill_worker"]) == (fact.answer, "prefill-1")
        pools.prefills.remove(lost)
        await lost.close()
        await pools.drained()
        handles = followers(left)
    assert all(handle.wait(5.0) for handle in handles)
