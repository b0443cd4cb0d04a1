"""A prompt's tokens as an array, whatever its spans hold."""

from __future__ import annotations

import pytest

from vlcache_dist.engine.sequence import prompt_tokens
from vlcache_dist.types import MediaSpan, ReuseMode, SamplingParams
from vlcache_dist.wire import Generation


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ((1, 2, 3), ()),
        ((1, 9, 9, 9, 9, 2), ((1, 4),)),
        ((9, 9, 1, 9, 9, 9, 9, 3, 4), ((0, 2), (3, 4))),
        ((1, 9, 9, 7, 9, 2), ((1, 4),)),  # nobody promises one placeholder
    ],
)
def test_prompt_tokens(ids: tuple[int, ...], spans: tuple[tuple[int, int], ...]) -> None:
    media = tuple(
        MediaSpan(b"k" * 32, start, length, (1, 2, 2 * length), index=i) for i, (start, length) in enumerate(spans)
    )
    generation = Generation("r", "", ids, media, SamplingParams(), ReuseMode.OFF, "none")
    assert prompt_tokens(generation).tolist() == list(ids)
