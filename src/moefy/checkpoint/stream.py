"""A large file, written front to back while the caller makes the next part."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
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


class WriteThread:
    """Writes files from a few buffers that it uses again and again; memory is those buffers.

    A conversion moves every byte of a model once, so what surrounds the bytes decides its speed:
    the data goes from these buffers to the disk directly where the file system can do that, and
    the kernel need not find pages for a copy of it. Elsewhere the same writes go through its cache.

    Errors of the disk are raised by the next call of `FileStream.write` or `close`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        memories = [mmap.mmap(-1, _BUFFER_BYTES) for _ in range(_NUM_BUFFERS)]  # page-aligned
        self._buffers = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
        self._written: list[Future[None] | None] = [None] * _NUM_BUFFERS
        self._current = 0

    def buffer(self) -> Tensor:
        """Return the current buffer once its last contents are on their way."""
        written = self._written[self._current]
        if written is not None:
            self._written[self._current] = None
            written.result()
        return self._buffers[self._current]

    def submit(self, handle: int, size: int, offset: int) -> None:
        """Write the first bytes of the current buffer; go on with the next one."""
        data = self._buffers[self._current][:size].numpy().data
        self._written[self._current] = self._thread.submit(_write, handle, data, offset)
        self._current = (self._current + 1) % _NUM_BUFFERS

    def wait(self) -> None:
        """Return when everything was written."""
        for _ in self._buffers:
            self.buffer()
            self._current = (self._current + 1) % _NUM_BUFFERS

    def close(self) -> None:
        """Give the buffers back; what was submitted is still written, its errors are dropped."""
        self._thread.shutdown()


class FileStream:
    """A file whose head is written last, because only the end tells what stands in it.

    Args:
        path: of a new file.
        head_bytes: kept free at the start; a multiple of `BLOCK_BYTES`.
        thread: does the writing; for one stream at a time.
    """

    def __init__(self, path: Path, head_bytes: int, thread: WriteThread) -> None:
        assert head_bytes % BLOCK_BYTES == 0
        self._path, self._thread = path, thread
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # not every file system can
            _set_direct(self._handle, on=True)
        self._offset, self._filled = head_bytes, 0

    def write(self, data: Tensor) -> None:
        """Append a flat tensor's bytes."""
        data = data.view(torch.uint8)
        while len(data):
            buffer = self._thread.buffer()
            part = min(len(data), len(buffer) - self._filled)
            buffer[self._filled : self._filled + part] = data[:part]
            data = data[part:]
            self._filled += part
            if self._filled == len(buffer):
                self._flush(self._filled)
                self._filled = 0

    def close(self, head: bytes) -> None:
        """Write what is left, and the head."""
        aligned = self._filled // BLOCK_BYTES * BLOCK_BYTES
        rest = bytes(self._thread.buffer()[aligned : self._filled].numpy().data)
        if aligned:
            self._flush(aligned)
        self._thread.wait()
        with self._path.open("rb+") as file:
            file.seek(self._offset)
            file.write(rest)
            file.seek(0)
            file.write(head)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _flush(self, size: int) -> None:
        self._thread.submit(self._handle, size, self._offset)
        self._offset += size


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
