"""One step of training; on a GPU one CUDA graph per shape of batch.

A step of this small model is some 3,000 kernels of a few microseconds: launched one by one they take 62 ms on one H200,
of which the GPU works 23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from training.batches import Batch

CLIP = 1.0


class Step:
    """``loss`` of a batch, its gradient and the optimizer's step. The first batch of a shape is computed kernel by
    kernel (libraries choose and allocate then), the second records the graph, and all but the first replay it. Graphs
    share their memory: one runs at a time. ``loss`` must leave the host out: no copies to the device, no read-backs."""

    def __init__(
        self,
        loss: Callable[[Batch], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._loss, self._optimizer, self._parameters = loss, optimizer, list(parameters)
        self._seen: set[Any] = set()
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]] = {}
        self._graphed = self._parameters[0].is_cuda
        self._pool = torch.cuda.graph_pool_handle() if self._graphed else None

    @property
    def graphs(self) -> int:
        return len(self._graphs)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """``batch`` lies on the host, pinned where the model is on a GPU. The loss, a scalar on the device that the
        next step of the same shape overwrites."""
        device = self._parameters[0].device
        if not self._graphed:
            return self._work(batch.to(device))
        if batch.shape not in self._seen:
            self._seen.add(batch.shape)
            side = torch.cuda.Stream()  # what autograd keeps must not be tied to the stream that is recorded
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = self._work(batch.to(device))
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if batch.shape not in self._graphs:
            fixed = batch.to(device)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # Other threads (the loader that pins memory) may go on allocating meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = self._work(fixed)
            self._graphs[batch.shape] = graph, fixed, loss
        graph, fixed, loss = self._graphs[batch.shape]
        for mine, theirs in zip(fixed.tensors, batch.tensors, strict=True):
            mine.copy_(theirs, non_blocking=True)
        graph.replay()
        return loss

    def _work(self, batch: Batch) -> torch.Tensor:
        loss = self._loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, CLIP, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()
