"""The model on CUDA: equal to the CPU, and no host synchronization inside a forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from vlcache_dist.engine.batch import ChunkWork, SpanWork, build_step
from vlcache_dist.model.batch import ForwardBatch, ScatterBatch
from vlcache_dist.model.rope import mrope_positions
from vlcache_dist.model.sampler import SamplingBatch, sample
from vlcache_dist.model.upload import upload
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.types import MediaSpan, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRIDS = [(1, 20, 24), (2, 16, 10), (1, 8, 8)]
BLOCK = 16


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("tiny")


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Any synchronization with the host that torch knows of is an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def patches(seed: int = 0) -> torch.Tensor:
    count = sum(t * h * w for t, h, w in GRIDS)
    return torch.randn(count, 1176, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    deviation = (ours.float().cpu() - reference.float()).abs().max() / reference.float().abs().max()
    assert float(deviation) < tolerance


def test_upload_keeps_values_shapes_and_dtypes() -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 9, 7),
        rng.integers(0, 9, (3, 5)).astype(np.int32),
        np.empty(0, np.int64),
        rng.normal(size=(2, 3)).astype(np.float32),
        rng.normal(size=1),
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
    ]
    for array, tensor in zip(arrays, upload(arrays, "cuda"), strict=True):
        assert tensor.is_cuda
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
        assert tensor.cpu().numpy().dtype == array.dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.06)])
def test_vision_tower(checkpoint: Checkpoint, dtype: torch.dtype, tolerance: float) -> None:
    expected = checkpoint.load_vision_tower("cpu", torch.float32).forward(patches(), GRIDS)
    close(checkpoint.load_vision_tower("cuda", dtype).forward(patches().cuda(), GRIDS), expected, tolerance)


def test_vision_tower_does_not_synchronize(checkpoint: Checkpoint) -> None:
    tower, pixels = checkpoint.load_vision_tower("cuda", torch.bfloat16), patches().cuda()
    tower.forward(pixels, GRIDS)  # kernels compile
    with no_synchronization():
        tower.forward(pixels, GRIDS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.06)])
def test_prefill_decode_and_reuse(checkpoint: Checkpoint, dtype: torch.dtype, tolerance: float) -> None:
    expected = conversation(checkpoint, "cpu", torch.float32)
    for ours, reference in zip(conversation(checkpoint, "cuda", dtype), expected, strict=True):
        close(ours, reference, tolerance)


def test_forward_does_not_synchronize(checkpoint: Checkpoint) -> None:
    conversation(checkpoint, "cuda", torch.bfloat16)
    conversation(checkpoint, "cuda", torch.bfloat16, strict=True)


def conversation(checkpoint: Checkpoint, device: str, dtype: torch.dtype, strict: bool = False) -> list[torch.Tensor]:
    """Logits of: a recorded prefill, two decode steps, and a hit on the recorded span at another position."""
    text = checkpoint.config.text
    model = checkpoint.load_language_model(device, dtype)
    tower = checkpoint.load_vision_tower(device, dtype)
    kv_row = text.num_kv_heads * text.head_dim
    grid, start = GRIDS[0], 4
    length = grid[1] * grid[2] // 4
    pages = torch.zeros(text.num_layers, 2, 64, BLOCK, text.num_kv_heads, text.head_dim, device=device, dtype=dtype)
    arena = torch.zeros(length * (text.hidden_size + 2 * text.num_layers * kv_row), device=device, dtype=dtype)
    record = length * text.hidden_size
    arena[:record] = tower.forward(patches().to(device), GRIDS)[:length].reshape(-1)

    def forward(chunk: ChunkWork) -> torch.Tensor:
        step = build_step([chunk], num_layers=text.num_layers, block_size=BLOCK, kv_row=kv_row, hidden=text.hidden_size)
        with no_synchronization() if strict else nullcontext():
            batch, scatter = ForwardBatch.from_step(step, device), ScatterBatch.from_step(step, device)
            return model.forward(batch, pages, arena, scatter)

    ids = np.array([5, 6, 7, 857] + [860] * length + [858, 9, 10, 11, 12, 13])
    count = len(ids) - 2
    positions, _ = mrope_positions(len(ids), [MediaSpan(b"", start, length, grid)], checkpoint.config)
    table = np.arange(1, 20, dtype=np.int32)
    spans = [SpanWork(start, length, embed_base=0, record_base=record)]
    logits = [forward(ChunkWork(ids, positions, table, 0, count, True, spans))]
    logits += [forward(ChunkWork(ids, positions, table, i, i + 1, True)) for i in (count, count + 1)]
    later = np.concatenate([[20, 21, 22], ids])
    positions, _ = mrope_positions(len(later), [MediaSpan(b"", start + 3, length, grid)], checkpoint.config)
    depths = np.where(np.arange(length) < 6, text.num_layers, np.where(np.arange(length) < 12, 4, 0)).astype(np.int32)
    reused = [SpanWork(start + 3, length, depths=depths, kv_base=record, embed_base=0)]
    logits.append(forward(ChunkWork(later, positions, table + 20, 0, len(later), True, reused)))
    return logits


def test_sampler_on_the_device() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, top_p=0.9, seed=1, logprobs=3),
        SamplingParams(temperature=1.3, top_k=20, seed=2),
        SamplingParams(temperature=1.0, seed=3),
    ]
    scores = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    expected = sample(scores, SamplingBatch.build(params, [0, 1, 2, 3], "cpu"))
    there = scores.cuda()
    sample(there, SamplingBatch.build(params, [0, 1, 2, 3], "cuda"))
    with no_synchronization():
        ours = sample(there, SamplingBatch.build(params, [0, 1, 2, 3], "cuda"))
    assert ours.to_host(params)[0] == expected.to_host(params)[0]
