"""Views lie where the book says, in the shapes of the layout, and the memory plan fits the bytes."""

import pytest
import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.kv.arena import ALIGNMENT_BYTES, TORCH_DTYPES, Arena, allocate_pages, free_bytes, plan_memory
from vlcache_dist.kv.layout import DTYPE_BYTES, KVLayout
from vlcache_dist.kv.object_store import ObjectStore
from vlcache_dist.types import ObjectKind


def layout(dtype="float32"):
    return KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, hidden=10, dtype=dtype, model="m")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_views(dtype):
    shape = layout(dtype)
    arena = Arena(shape, 4096, "cpu")
    assert arena.tensor.dtype == TORCH_DTYPES[dtype] and arena.tensor.shape == (4096,)
    assert arena.tensor.itemsize == shape.itemsize
    arena.tensor.copy_(torch.arange(4096) % 251)
    before = arena.tensor.clone()
    store = ObjectStore(4096, alignment=arena.alignment)
    store.begin(ObjectKind.EMBEDDING, b"a" * 32, b"v" * 16, 1, 0.0)
    extent = store.begin(ObjectKind.KV, b"a" * 32, b"v" * 16, shape.kv_elements(5), 0.0)
    view = arena.kv_view(extent, 5)
    assert view.shape == (3, 2, 5, 2, 4) and view.is_contiguous()
    assert extent.offset * shape.itemsize % ALIGNMENT_BYTES == 0 and extent.offset > 0
    offset, length = shape.layer_range(5, 1, 3)
    start = extent.offset + offset
    assert torch.equal(view[1:3].flatten(), arena.tensor[start : start + length])
    view[2, 1, 4, 1, 3] = -1
    changed = (arena.tensor != before).nonzero().flatten().tolist()
    assert changed == [extent.offset + extent.elements - 1]
    embedding = store.begin(ObjectKind.EMBEDDING, b"b" * 32, b"v" * 16, shape.embedding_elements(7), 0.0)
    rows = arena.embedding_view(embedding, 7)
    assert rows.shape == (7, 10) and rows.data_ptr() == arena.tensor[embedding.offset :].data_ptr()
    assert arena.byte_range(embedding) == (embedding.offset * shape.itemsize, 70 * shape.itemsize)
    with pytest.raises(ValueError, match="a view of"):
        arena.kv_view(extent, 6)
    with pytest.raises(ValueError, match="a view of"):
        arena.embedding_view(embedding, 8)


def test_pages_are_zero():
    pages = allocate_pages(layout("bfloat16"), 7, 16, "cpu")
    assert pages.shape == (3, 2, 7, 16, 2, 4) and pages.dtype == torch.bfloat16
    assert not pages.any()


def test_memory_plan_fits_its_bytes():
    shape = layout("bfloat16")
    block = shape.kv_token * 2 * 16
    plan = plan_memory(shape, 16, pages_bytes=10 * block + block - 1, arena_bytes=1000)
    assert plan.num_blocks == 10
    assert plan.arena_elements == 3 * ALIGNMENT_BYTES // 2
    with pytest.raises(ConfigError, match="no block of 16"):
        plan_memory(shape, 16, pages_bytes=block - 1, arena_bytes=1000)
    with pytest.raises(ConfigError, match="not even one"):
        plan_memory(shape, 16, pages_bytes=block, arena_bytes=ALIGNMENT_BYTES - 1)


def test_free_memory_is_what_can_be_allocated():
    assert 1 << 20 < free_bytes("cpu") < 1 << 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu():
    before = free_bytes("cuda")
    arena = Arena(layout("bfloat16"), 1 << 28, "cuda")
    assert arena.tensor.is_cuda
    assert before - free_bytes("cuda") >= 1 << 29
