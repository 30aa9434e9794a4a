"""The device, its precision and its memory.

torch is imported when it is needed: `import moefy` and `moefy --help` must not wait for it.

By default glibc returns a large block to the system when it is freed and asks for it again a moment
later; the system then fills it with zeros, 4 KiB at a time. In training on a CPU that was a third
of the time (docs/performance.md, "Memory that is asked for again").
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_USUAL = {_MMAP_MAX: 65_536, _TRIM_THRESHOLD: 128 << 10}
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}


def device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait for the accelerator, so that a clock reads what was computed."""
    import torch

    if device().type == "cuda":
        torch.cuda.synchronize()


def training_precision(asked: str) -> str:
    """Return the dtype of products in training; auto is bfloat16 where the processor has it."""
    if asked != "auto":
        return asked
    if device().type == "cuda":
        return "bfloat16"
    flags = Path("/proc/cpuinfo")
    has_bf16 = flags.is_file() and "avx512_bf16" in flags.read_text()
    return "bfloat16" if has_bf16 else "float32"


def products_in(precision: str, place: torch.device) -> torch.autocast:
    """Return a context in which matrix products have a precision; weights keep their dtype."""
    import torch

    return torch.autocast(place.type, torch.bfloat16, enabled=precision == "bfloat16")


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held, 0 where that is not known."""
    if found := _status_bytes("VmHWM:"):  # getrusage counts what was before `exec`, too
        return found
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Return the memory that this process holds, 0 where that is not known."""
    return _status_bytes("VmRSS:")


def _status_bytes(key: str) -> int:
    with suppress(OSError, IndexError):  # only Linux has the file
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(key)[2].split()[0])
    return 0


def ask_for_huge_pages() -> None:
    """Let torch ask the system for pages of 2 MiB, unless the user has decided that.

    torch reads the variable when it allocates its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory for the next tensor of the same size until the block ends.

    This costs a few percent more memory. Nothing changes without glibc.
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


Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def worker_threads(
    most: int,
) -> Iterator[tuple[int, Callable[[Callable[[Part], Result], Iterable[Part]], list[Result]]]]:
    """Share torch's threads among Python threads, at most `most` of them.

    Products that are too small for several threads run beside each other then. Yields how many
    there are, and a `map` that runs a function in them.
    """
    import torch

    threads = torch.get_num_threads()
    count = 1 if device().type == "cuda" else max(1, min(most, threads))
    if count == 1:
        yield 1, lambda work, parts: list(map(work, parts))
        return
    each = threads // count
    torch.set_num_threads(each)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            yield count, lambda work, parts: list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)


def fastest(run: Callable[[], Sequence[float]]) -> list[float]:
    """Return the least of each of a run's times: what else the machine does only adds to them.

    There are three runs, fewer where these have taken more than four seconds.
    """
    started, runs = time.perf_counter(), [run()]
    while len(runs) < 3 and time.perf_counter() - started < 4:
        runs.append(run())
    return [min(times) for times in zip(*runs, strict=True)]


def multiply_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of large square matrices, the best of five."""
    import torch

    width = 8192 if device().type == "cuda" else 1024
    left, right = (torch.ones(width, width, dtype=dtype, device=device()) for _ in range(2))
    elapsed = []
    for _ in range(5):
        synchronise()
        started = time.perf_counter()
        left @ right
        synchronise()
        elapsed.append(time.perf_counter() - started)
    return 2 * width**3 / min(elapsed)
