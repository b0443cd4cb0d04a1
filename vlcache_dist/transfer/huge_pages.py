"""Huge pages for arenas in CPU memory: the kernel copies between processes page by page, faster with large ones."""

from __future__ import annotations

import ctypes
import logging
import mmap

log = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20


def advise_huge_pages(address: int, nbytes: int) -> bool:
    """Ask for huge pages under the aligned inside of a range; it helps where nothing has been written yet. False if
    there is no room for one, or the kernel has none to give."""
    start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = (address + nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if length <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.madvise(start, length, mmap.MADV_HUGEPAGE) != 0:
        log.info("no huge pages for the arena: errno %d", ctypes.get_errno())
        return False
    return True
