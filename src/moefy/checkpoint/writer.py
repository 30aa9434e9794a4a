"""Native checkpoints, streamed into shards: a tensor is on disk as soon as it is added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.reader import INDEX, SINGLE
from moefy.checkpoint.stream import BLOCK_BYTES, FileStream

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_BYTES_PER_TENSOR = 192
_METADATA = {"__metadata__": {"format": "pt"}}


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
        self._head_bytes = -(-head_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._header_bytes = self._head_bytes - 8  # its length stands before it
        self._file: FileStream | None = None
        self._header: dict[str, Any] = dict(_METADATA)
        self._header_used = len(_json(_METADATA))
        self._filled_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self.total_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # an error before `finish`
            self._file.abandon()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: the name was added before.
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
            self._file.write(tensor.contiguous().flatten())
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
