"""A large file, written past the kernel's cache while the caller makes the next part.

A conversion moves every byte of a model once, and a page that was not used before costs a virtual
machine more than the bytes that are moved into it. The data therefore goes from a few buffers, used
again and again, directly to the disk. docs/experiments.md, section 5, compares a plain writer.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 4096
"""Direct writes start and end at multiples of this; no disk in use has larger blocks."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_BUFFER_BYTES = 16 << 20
_NUM_BUFFERS = 3


class FileStream:
    """A file whose head is written last, because only the end tells what stands in it.

    An error of the disk is raised by a later call of `write`, or by `close`.

    Args:
        path: a new file.
        head_bytes: bytes kept free at the start; a multiple of `BLOCK_BYTES`.
    """

    def __init__(self, path: Path, head_bytes: int) -> None:
        assert head_bytes % BLOCK_BYTES == 0
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # not every file system can
            _set_direct(self._handle, on=True)
        # direct writes need memory that begins at a page, as mmap gives it
        memories = [mmap.mmap(-1, _BUFFER_BYTES) for _ in range(_NUM_BUFFERS)]
        self._buffers = deque(torch.frombuffer(memory, dtype=torch.uint8) for memory in memories)
        self._thread = ThreadPoolExecutor(1)
        self._writes: deque[Future[None]] = deque()
        self._offset, self._filled = head_bytes, 0

    def write(self, data: Tensor) -> None:
        """Append a flat tensor's bytes."""
        data = data.view(torch.uint8)
        while len(data):
            part = min(len(data), _BUFFER_BYTES - self._filled)
            self._buffers[0][self._filled : self._filled + part] = data[:part]
            data = data[part:]
            self._filled += part
            if self._filled == _BUFFER_BYTES:
                self._flush(self._filled)

    def close(self, head: bytes) -> None:
        """Write what is left, and the head."""
        aligned = self._filled // BLOCK_BYTES * BLOCK_BYTES
        rest = bytes(self._buffers[0][aligned : self._filled].numpy().data)
        self._flush(aligned)
        for write in self._writes:
            write.result()
        with self._path.open("rb+") as file:
            file.seek(self._offset)
            file.write(rest)
            file.seek(0)
            file.write(head)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._thread.shutdown()
        os.close(self._handle)

    def _flush(self, size: int) -> None:
        data = self._buffers[0][:size].numpy().data
        self._writes.append(self._thread.submit(_write, self._handle, data, self._offset))
        self._offset, self._filled = self._offset + size, 0
        self._buffers.rotate(-1)
        if len(self._writes) == _NUM_BUFFERS:  # the oldest write reads the buffer that comes next
            self._writes.popleft().result()


def _set_direct(handle: int, *, on: bool) -> bool:
    """Write past the kernel's cache, or through it; say whether that changed anything."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    wanted = flags | _DIRECT if on else flags & ~_DIRECT
    if wanted != flags:
        fcntl.fcntl(handle, fcntl.F_SETFL, wanted)
    return wanted != flags


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        try:
            written = os.pwrite(handle, data, offset)
        except OSError as error:
            if error.errno == errno.EINVAL and _set_direct(handle, on=False):
                continue
            raise
        data, offset = data[written:], offset + written
        if written % BLOCK_BYTES:  # the disk is nearly full; the next write will say so
            _set_direct(handle, on=False)
