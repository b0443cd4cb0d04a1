"""What is started is stopped: threads, descriptors, tasks; and a process that stops without closing ends quietly."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from pathlib import Path

from pools import Pools, picture

EARLY = """
import asyncio, sys
from pools import Pools, picture

async def main() -> None:
    pools = await Pools(prefills=1).__aenter__()
    events = pools.events(picture(1), "What is there?", ignore_eos=True, max_tokens=500)
    for _ in range(3):
        await anext(events)
    {end}

asyncio.run(main())
"""


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """Native ones included; but the event loop's executor, which grows up to a limit, is not ours."""
    executor = [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")]
    return len(os.listdir("/proc/self/task")) - len(executor)


async def settled() -> tuple[int, int, int]:
    """Threads, descriptors and tasks; the kernel lists a thread for a moment after it was joined."""
    last, now = None, (threads(), descriptors(), len(asyncio.all_tasks()))
    while now != last:
        await asyncio.sleep(0.2)
        last, now = now, (threads(), descriptors(), len(asyncio.all_tasks()))
    return now


async def test_nothing_is_left_when_everything_is_closed() -> None:
    image = picture(1)

    async def once() -> None:
        async with Pools(prefills=1) as pools:
            await pools.ask(image, image.facts[0].question)
            running = asyncio.create_task(pools.ask(image, "What is there?", ignore_eos=True, max_tokens=500))
            await asyncio.sleep(0.2)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    await once()  # imports, pools of libraries
    before = await settled()
    for _ in range(2):
        await once()
    after = await settled()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


async def test_a_process_that_forgets_to_close_ends_quietly() -> None:
    async def ends(end: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            EARLY.format(end=end),
            cwd=Path(__file__).parent,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, said = await asyncio.wait_for(process.communicate(), 90)
        return process.returncode, said.decode()

    (returned, quiet), (raised, loud) = await asyncio.gather(ends("return"), ends("raise RuntimeError('done')"))
    assert (returned, raised) == (0, 1), quiet + loud
    assert not quiet and "RuntimeError: done" in loud
    assert "terminate called" not in loud and "Fatal" not in loud
