"""Random traffic on little memory: requests of all kinds come, wait, are aborted, handed over and released. After every
operation the books agree, exact answers are exact, and in the end nothing is left."""

from __future__ import annotations

import random

import pytest
import torch
from engine_cases import Part, World

from vlcache_dist.engine.api import Mode
from vlcache_dist.errors import Overloaded, StoreFull
from vlcache_dist.types import FinishReason, ReuseMode

PLANS = ["none", "full", *["pyramid:60-10"] * 4]


def small_world(seed: int, arena_tokens: int) -> World:
    world = World(
        seed,
        num_blocks=2 * arena_tokens + 12,
        arena_tokens=arena_tokens,
        max_batch_tokens=20,
        max_running=4,
        max_waiting=6,
    )
    for name, grid in {"a": (1, 8, 8), "b": (1, 4, 8), "c": (1, 4, 4), "v": (2, 4, 4)}.items():
        world.picture(name, grid)
    return world


class Traffic:
    def __init__(self, seed: int, arena_tokens: int) -> None:
        self.world = small_world(seed, arena_tokens)
        self.oracle = World(seed, model=self.world.model)
        for name, grid in self.world.grids.items():
            self.oracle.picture(name, grid)
        self.random = random.Random(seed)
        self.texts = [self.world.text(self.random.randint(1, 12)) for _ in range(4)]
        self.prompts: list[list[Part]] = []
        self.checked = 0

    def add(self) -> None:
        rng = self.random
        parts: list[Part] = [rng.choice(self.texts)]
        if self.prompts and rng.random() < 0.7:
            parts = [*rng.choice(self.prompts), rng.choice(self.texts)]
        for _ in range(rng.randint(0, 2)):
            parts += [rng.choice("abcv"), rng.choice(self.texts)]
        if len(parts) < 8:
            self.prompts.append(parts)
        generation = self.world.generation(
            parts,
            reuse=rng.choice(["approx", "approx", "exact", "off"]),
            plan=rng.choice(PLANS),
            max_tokens=rng.randint(1, 6),
        )
        try:
            self.world.add(generation, rng.choice([Mode.GENERATE, Mode.GENERATE, Mode.PREFILL]))
        except Overloaded:
            self.world.drive()

    def abort(self) -> None:
        alive = [r for r, result in self.world.results.items() if not result.finish]
        if alive:
            victim = self.random.choice(alive)
            self.world.engine.abort(victim)
            self.world.results[victim].unresolved = []
            self.world.results[victim].finish = FinishReason.ABORT

    def hand_over(self) -> None:
        for request_id in list(self.world.engine._parked):
            if self.random.random() < 0.5:
                try:
                    self.world.engine.export(request_id, self.world.now)
                except StoreFull:
                    continue
                self.world.engine.validate()
            assert self.world.engine.release(request_id)

    def step(self) -> None:
        self.world.resolve()
        self.world.step()

    def run(self, operations: int) -> None:
        """So many at random, the books checked after each; then what is under way ends."""
        kinds = [self.add] * 4 + [self.step] * 10 + [self.abort, self.hand_over]
        for _ in range(operations):
            self.random.choice(kinds)()
            self.world.engine.validate()
        while self.world.engine._sequences:
            self.world.drive()
            self.hand_over()

    def check_exact(self) -> None:
        for request_id, generation in self.world.generations.items():
            result = self.world.results[request_id]
            if generation.reuse is ReuseMode.APPROX or not result.logprobs:
                continue
            parts = self.oracle.generation([generation.token_ids], reuse="off", max_tokens=1)
            again = type(generation)(
                f"oracle-{request_id}",
                "t",
                generation.token_ids,
                generation.spans,
                parts.sampling,
                ReuseMode.OFF,
                "none",
            )
            (expected,) = self.oracle.run(again)
            torch.testing.assert_close(result.logprobs[0], expected.logprobs[0], atol=1e-4, rtol=1e-4)
            self.checked += 1


@pytest.mark.parametrize("arena_tokens", [24, 400])
@pytest.mark.parametrize("seed", range(3))
def test_random_traffic(seed: int, arena_tokens: int) -> None:
    traffic = Traffic(seed, arena_tokens)
    traffic.run(250)
    traffic.check_exact()
    assert traffic.checked > 10
    assert all(result.finish or result.tokens for result in traffic.world.results.values())
    assert not any(result.failed for result in traffic.world.results.values())
    # The traffic was as wild as it was meant to be.
    stats, store = traffic.world.engine.stats(), traffic.world.store.stats()
    assert min(stats.spans_recorded, stats.spans_reused, stats.exact_hit_tokens, stats.aborted) > 0
    if arena_tokens < 100:
        assert min(traffic.world.num_store_full, store.num_evictions) > 0
    traffic.world.assert_idle()
