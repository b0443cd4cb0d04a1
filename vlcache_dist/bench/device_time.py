"""How long calls take on a CUDA device, by device events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def graph_us(calls: Sequence[Call], replays: int = 15) -> float:
    """Microseconds per call: the median replay of a graph of all calls, over their number."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_us(graph.replay, replays) / len(calls)


def median_us(run: Call, repeats: int) -> float:
    """Microseconds of ``run``, the median of ``repeats`` after three to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)
