"""How the process gets and gives back the memory of large tensors, on Linux.

By default glibc returns a large block to the system when it is freed and asks for it again a moment
later; the system then fills it with zeros, 4 KiB at a time. In training on a CPU that was a third
of the time (docs/performance.md, "Memory that is asked for again").
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_USUAL = {_MMAP_MAX: 65_536, _TRIM_THRESHOLD: 128 << 10}
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}


def ask_for_huge_pages() -> None:
    """Let torch ask the system for pages of 2 MiB, unless the user has decided that.

    torch reads this when it allocates its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed for the next tensor of that size, until the end.

    It costs a few percent more memory. Nothing changes without glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    assert libc is not None
    for setting, value in _KEEPING.items():
        libc.mallopt(setting, value)
    try:
        yield
    finally:
        for setting, value in _USUAL.items():
            libc.mallopt(setting, value)
        libc.malloc_trim(0)
