"""What a request does not wait for: later pictures' encoding, and the handoff behind its first token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pools import Pools, picture

from vlcache_dist.serve.chat import Delta


async def test_the_first_picture_is_prefilled_while_the_second_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Pools() as pools:
        (encoder,) = pools.encoders
        prepare, second = encoder._prepare, asyncio.Event()

        async def slow(task: Any) -> None:
            if task.span.index == 1:
                await second.wait()
            await prepare(task)

        monkeypatch.setattr(encoder, "_prepare", slow)
        a, b = picture(31), picture(32)
        asking = asyncio.create_task(pools.ask("1: ", a, "2: ", b, a.facts[0].question, prefill_worker="prefill-0"))
        try:
            await pools.until(lambda: pools.recorded == 1)
            assert pools.encoded == 1 and not asking.done(), (
                "the first picture's KV is there, the second's input is not"
            )
        finally:
            second.set()
        await asking
        assert (pools.recorded, pools.encoded) == (2, 2)
        await pools.drained()


async def test_the_first_token_is_out_before_the_handoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode worker does not get on with its READ; the client has the first token nevertheless."""
    async with Pools() as pools:
        image = picture(33)
        node = pools.decodes[0].node
        fetch, held = node.fetch_staging, asyncio.Event()

        async def slow(*arguments: Any) -> Any:
            await held.wait()
            return await fetch(*arguments)

        monkeypatch.setattr(node, "fetch_staging", slow)
        events = pools.events(image, image.facts[0].question, max_tokens=4, ignore_eos=True)
        try:
            first = await asyncio.wait_for(anext(events), 15.0)
            assert isinstance(first, Delta) and first.text and not held.is_set()
        finally:
            held.set()
        text = first.text
        async for event in events:
            text += event.text if isinstance(event, Delta) else ""
        assert text.startswith(first.text) and len(text) > len(first.text)
        await pools.drained()
