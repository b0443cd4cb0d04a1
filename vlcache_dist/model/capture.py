"""Capturing CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def captured(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what ``run`` launches, with its result; memory comes from ``pool``. Runs it once before, because what
    is compiled or allocated at first use cannot be captured.

    ``torch.cuda.graph`` collects garbage first, which in a large process takes longer than the capture, lest objects be
    freed in the middle of it; here the collector rests instead. Other threads may go on allocating.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(side):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):  # a capture that failed ends with an error of its own
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    current.wait_stream(side)
    return graph, result
