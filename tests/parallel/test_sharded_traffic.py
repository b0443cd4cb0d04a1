"""The engine's random traffic on two ranks: aborts, handoffs and full stores leave the ranks in step, and exact answers
are those of one rank."""

from __future__ import annotations

import random

import pytest
from sharded_world import CONFIG, World, sharded_world
from test_engine_random import Traffic


class ShardedTraffic(Traffic):
    def __init__(self, seed: int, world: World) -> None:
        self.world = world
        self.oracle = World(seed, config=CONFIG)
        for name, grid in {"a": (1, 8, 8), "b": (1, 4, 8), "c": (1, 4, 4), "v": (2, 4, 4)}.items():
            for each in (self.world, self.oracle):
                each.picture(name, grid)
        self.random = random.Random(seed)
        self.texts = [self.world.text(self.random.randint(1, 12)) for _ in range(4)]
        self.prompts = []
        self.checked = 0


@pytest.mark.parametrize("arena_tokens", [24, 400])
def test_random_traffic_on_two_ranks(arena_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_blocks": 2 * arena_tokens + 12, "max_batch_tokens": 20, "max_running": 4, "max_waiting": 6}
    with sharded_world(2, monkeypatch, seed=5, arena_tokens=arena_tokens, **options) as sharded:
        traffic = ShardedTraffic(5, sharded.world)
        traffic.run(120)
        traffic.check_exact()
        assert traffic.checked > 5
        assert not any(result.failed for result in traffic.world.results.values())
        assert sharded.group.lost is None
