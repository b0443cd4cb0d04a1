"""The tensors behind the books: the flat arena that extents live in, and the pages.

Both are allocated once, for life; the arena is what the transport registers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from vlcache_dist.errors import ConfigError
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.kv.object_store import Extent

ALIGNMENT_BYTES = 256  #: extents start at multiples of it: vector loads and RDMA like that

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a worker's memory is split. ``arena_elements`` is a multiple of the alignment."""

    num_blocks: int
    arena_elements: int


class Arena:
    """One flat 1-D tensor of the storage dtype, and typed views of extents in it. Views share the memory: they are
    valid as long as the extent is held (filling, pinned or leased)."""

    def __init__(self, layout: KVLayout, elements: int, device: torch.device | str) -> None:
        self.layout = layout
        self.tensor = torch.empty(elements, dtype=TORCH_DTYPES[layout.dtype], device=device)

    @property
    def alignment(self) -> int:
        """In elements: what the object store is to be made with."""
        return ALIGNMENT_BYTES // self.layout.itemsize

    def kv_view(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """[layer, 2, token, kv_head, head_dim] of a KV or staging extent. Raises ValueError if it is too small."""
        layout = self.layout
        shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
        return self._view(extent, layout.kv_elements(num_tokens)).view(shape)

    def embedding_view(self, extent: Extent, num_tokens: int) -> torch.Tensor:
        """[token, hidden] of an embedding extent. Raises ValueError if it is too small."""
        return self._view(extent, self.layout.embedding_elements(num_tokens)).view(num_tokens, self.layout.hidden)

    def byte_range(self, extent: Extent) -> tuple[int, int]:
        """(offset, length) in bytes from the arena's start, as transports count."""
        return extent.offset * self.layout.itemsize, extent.elements * self.layout.itemsize

    def _view(self, extent: Extent, elements: int) -> torch.Tensor:
        if elements > extent.elements:
            raise ValueError(f"a view of {elements} elements of an extent of {extent.elements}")
        return self.tensor[extent.offset : extent.offset + elements]


def allocate_pages(layout: KVLayout, num_blocks: int, block_size: int, device: torch.device | str) -> torch.Tensor:
    """Zeroed pages [layer, 2, block, block_size, kv_head, head_dim]: rows never written are read only under a mask,
    and a mask does not silence NaN."""
    shape = (layout.num_layers, 2, num_blocks, block_size, layout.num_kv_heads, layout.head_dim)
    return torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype], device=device)


def plan_memory(layout: KVLayout, block_size: int, *, pages_bytes: int, arena_bytes: int) -> MemoryPlan:
    """Blocks and arena elements that fit the given bytes. Raises ConfigError if either holds nothing."""
    num_blocks = pages_bytes // (layout.kv_token * block_size * layout.itemsize)
    arena_elements = arena_bytes // ALIGNMENT_BYTES * (ALIGNMENT_BYTES // layout.itemsize)
    if num_blocks < 1:
        raise ConfigError(
            f"{pages_bytes} bytes of paged KV hold no block of {block_size} tokens "
            f"({layout.kv_token * block_size * layout.itemsize} bytes): give more memory"
        )
    if arena_elements < layout.kv_token:
        raise ConfigError(f"{arena_bytes} bytes of image store hold not even one token's KV: give more memory")
    return MemoryPlan(num_blocks, arena_elements)


def free_bytes(device: torch.device | str) -> int:
    """Memory that may still be allocated: the GPU's free memory, or on CPU what the kernel calls available, within
    the control group's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (ceiling := limit.read_text().strip()) != "max":
        available = min(available, int(ceiling) - int(used.read_text()))
    return max(available, 0)
