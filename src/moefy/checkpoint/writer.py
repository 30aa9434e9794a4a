"""Native checkpoints, streamed into shards: a tensor is on disk as soon as it is added.

A conversion moves every byte of a model once, and a page that was not used before costs a virtual
machine more than the bytes that are moved into it. The data therefore goes from a few buffers, used
again and again, directly to the disk, while the caller makes the next part. docs/experiments.md,
section 5, compares a plain writer.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.reader import INDEX, SINGLE, weight_files
from moefy.checkpoint.tensor_file import SafetensorsFile
from moefy.errors import CheckpointError
from moefy.storage import fcntl

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_BYTES_PER_TENSOR = 192
_METADATA = {"__metadata__": {"format": "pt"}}
_BLOCK_BYTES = 4096
"""Direct writes start and end at multiples of this; no disk in use has larger blocks."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_BUFFER_BYTES = 16 << 20
_NUM_BUFFERS = 3


class ShardWriter:
    """Writes tensors into safetensors shards of a folder; memory is a few buffers.

    The files get their final names in `finish`; without it the folder does not load. To be used in
    a `with` statement.

    Args:
        folder: an existing, empty folder.
        shard_bytes: a new shard begins when the next tensor would exceed this size.
        max_tensors: tensors that the header has room for; more begin a new shard.
    """

    def __init__(
        self, folder: Path, *, shard_bytes: int = 4 << 30, max_tensors: int = 1000
    ) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        # The header stands in front of the data, is known at the end, and may end in spaces: room
        # for it is left free.
        head_bytes = 1024 + _HEADER_BYTES_PER_TENSOR * max_tensors
        self._head_bytes = -(-head_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        self._header_bytes = self._head_bytes - 8  # its length stands before it
        self._file: FileStream | None = None
        self._beside = ThreadPoolExecutor(1)
        self._header: dict[str, Any] = dict(_METADATA)
        self._header_used = len(_json(_METADATA))
        self._filled_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self.total_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown()
        if self._file is not None:  # an error before `finish`
            self._file.abandon()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; a ValueError for a name that was added before.

        Raises:
            CheckpointError: a value is not finite.
        """
        if name in self._names:
            raise ValueError(f"{name} was written twice")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        entry: dict[str, Any] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        entry["data_offsets"] = [self._filled_bytes, self._filled_bytes + size]
        # a new shard where the data or the header would be too large
        room = len(_json({name: entry}))  # its braces stand for the comma
        if self._filled_bytes and (
            entry["data_offsets"][1] > self._shard_bytes
            or self._header_used + room > self._header_bytes
        ):
            self._close()
            entry["data_offsets"] = [0, size]
        if self._file is None:
            self._file = FileStream(self._part(len(self._shards) + 1), self._head_bytes)
        self._header[name] = entry
        self._header_used += room
        if size:
            extremes = self._beside.submit(torch.aminmax, tensor)  # NaN if one is
            self._file.write(tensor.contiguous().flatten())
            if not all(value.isfinite() for value in extremes.result()):
                raise CheckpointError(
                    f"{name} would hold NaN or infinite values: the source's weights are damaged, "
                    "or the converted ones too large for their dtype"
                )
        self._filled_bytes += size
        self.total_bytes += size

    def finish(self, config: Mapping[str, Any]) -> None:
        """Complete the last shard; write the index if there are several, and config.json last."""
        self._close()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (self._folder / "config.json").write_text(text)

    def _part(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.partial"

    def _close(self) -> None:
        if self._file is None:
            return
        header = _json(self._header).ljust(self._header_bytes)
        self._file.close(self._header_bytes.to_bytes(8, "little") + header)
        self._shards.append([name for name in self._header if name not in _METADATA])
        self._file, self._header, self._filled_bytes = None, dict(_METADATA), 0
        self._header_used = len(_json(_METADATA))


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def replace_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put other values into tensors of a checkpoint's files; dtypes and shapes stay.

    Raises:
        CheckpointError: a value is not finite in the stored dtype.
    """
    for path in (folder / name for name in weight_files(folder)):
        file = SafetensorsFile(path)
        with path.open("rb+") as stream:
            for name in tensors.keys() & file.headers.keys():
                dtype, shape = file.headers[name]
                stored = tensors[name].to(getattr(torch, dtype)).contiguous()
                assert tuple(stored.shape) == shape
                if not stored.isfinite().all():
                    raise CheckpointError(f"{name} would hold NaN or infinite values")
                stream.seek(file.starts[name])
                stream.write(stored.flatten().view(torch.uint8).numpy().data)


class FileStream:
    """A new file whose head, of some blocks, is written last: only the end tells what stands in it.

    An error of the disk is raised by a later call of `write`, or by `close`.
    """

    def __init__(self, path: Path, head_bytes: int) -> None:
        assert head_bytes % _BLOCK_BYTES == 0
        self._path = path
        how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # Windows has it
        self._handle = os.open(path, how, 0o666)
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
        aligned = self._filled // _BLOCK_BYTES * _BLOCK_BYTES
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
    if fcntl is None or not _DIRECT:
        return False
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    wanted = flags | _DIRECT if on else flags & ~_DIRECT
    if wanted != flags:
        fcntl.fcntl(handle, fcntl.F_SETFL, wanted)
    return wanted != flags


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        try:
            os.lseek(handle, offset, os.SEEK_SET)  # Windows has no pwrite; one thread writes
            written = os.write(handle, data)
        except OSError as error:
            if error.errno == errno.EINVAL and _set_direct(handle, on=False):
                continue
            raise
        data, offset = data[written:], offset + written
        if written % _BLOCK_BYTES:  # the disk is nearly full; the next write will say so
            _set_direct(handle, on=False)
