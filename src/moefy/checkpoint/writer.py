"""Native checkpoints, written shard by shard with a bounded buffer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moefy.checkpoint.reader import INDEX, SINGLE


class ShardWriter:
    """Writes tensors into safetensors shards of a folder.

    Tensors are buffered until a shard is full, so memory is one shard. The files get their final
    names in `finish`; without it the folder does not load.

    Args:
        folder: an existing, empty folder (see `storage.whole_folder`).
        shard_bytes: a shard is written when the next tensor would exceed this size.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = 1 << 30) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._buffer: dict[str, Tensor] = {}
        self._buffered_bytes = 0
        self.total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is copied if it is a view.

        Raises:
            ValueError: the name was added before.
        """
        if name in self._buffer or any(name in shard for shard in self._shards):
            raise ValueError(f"{name} was written twice")
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._buffered_bytes + size > self._shard_bytes:
            self._flush()
        self._buffer[name] = tensor.contiguous()
        self._buffered_bytes += size
        self.total_bytes += size

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write what is buffered, the index if there are several shards, and config.json last."""
        self._flush()
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

    def _flush(self) -> None:
        if not self._buffer:
            return
        self._shards.append(list(self._buffer))
        save_file(self._buffer, self._part(len(self._shards)), metadata={"format": "pt"})
        self._buffer = {}
        self._buffered_bytes = 0
