"""Single flight inside one worker."""

from __future__ import annotations

import asyncio

import pytest

from vlcache_dist.prefill_workers.production import LocalProduction

KEY = b"k" * 32


async def test_one_producer_and_all_waiters_wake() -> None:
    production = LocalProduction()
    assert production.begin(KEY) and not production.begin(KEY) and production.active(KEY)
    waiters = [asyncio.create_task(production.wait(KEY, 10.0)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(waiter.done() for waiter in waiters)
    production.end(KEY)
    await asyncio.wait_for(asyncio.gather(*waiters), 1.0)
    assert not production.active(KEY) and len(production) == 0
    assert production.begin(KEY), "the next one may produce"


async def test_waiting_ends_with_time_and_not_at_all_without_a_producer() -> None:
    production = LocalProduction()
    await asyncio.wait_for(production.wait(KEY, 10.0), 1.0)
    production.begin(KEY)
    await asyncio.wait_for(production.wait(KEY, 0.01), 1.0)
    assert production.active(KEY)


async def test_ending_what_never_began_is_an_error() -> None:
    with pytest.raises(KeyError):
        LocalProduction().end(KEY)
