from pathlib import Path

import pytest
import torch

from vlcache_dist.transfer.huge_pages import HUGE_PAGE_BYTES, advise_huge_pages


def test_an_arena_gets_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no huge pages")
    arena = torch.empty(8 * HUGE_PAGE_BYTES, dtype=torch.uint8)
    assert advise_huge_pages(arena.data_ptr(), arena.numel())
    arena.fill_(7)
    assert arena.sum() == 7 * arena.numel()


def test_what_holds_no_huge_page_is_left_alone() -> None:
    assert not advise_huge_pages(HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES)
    assert not advise_huge_pages(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES - 1)
