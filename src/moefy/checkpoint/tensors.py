"""Weight files, read lazily: headers when they are opened, a tensor when it is asked for."""

from __future__ import annotations

import json
import math
import mmap
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moefy.checkpoint.families import DenseFamily
from moefy.errors import CheckpointError

_MADV_POPULATE_READ = 22  # of <sys/mman.h>; Python has no name for it
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorFile(ABC):
    """An open weight file."""

    headers: Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        found = ((getattr(torch, dtype).itemsize, shape) for dtype, shape in self.headers.values())
        return sum(itemsize * math.prod(shape) for itemsize, shape in found)

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""


class SafetensorsFile(TensorFile):
    """A `.safetensors` file; the library checks the header."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):
            pass
        # The data is mapped tensor by tensor, so that no more of a large file is in memory than
        # somebody holds; the library would map all of it.
        self._path = path
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(header_bytes))
        entries.pop("__metadata__", None)
        self.headers = {
            name: (_SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
            for name, entry in entries.items()
        }
        first_byte = 8 + header_bytes
        self._starts = {name: first_byte + e["data_offsets"][0] for name, e in entries.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""
        dtype_name, shape = self.headers[name]
        first, last, _ = (rows or slice(None)).indices(shape[0] if shape else 1)
        if shape:
            shape = (last - first, *shape[1:])
        dtype = getattr(torch, dtype_name)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        start = self._starts[name] + first * row_bytes
        skipped = start % mmap.ALLOCATIONGRANULARITY  # a mapping begins at a page
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < start + size:
                raise CheckpointError(f"{self._path} ends inside {name}: fetch it again")
            memory = mmap.mmap(
                file.fileno(), skipped + size, access=mmap.ACCESS_COPY, offset=start - skipped
            )
        with suppress(OSError):  # one call instead of a fault for every few pages; Linux 5.14
            memory.madvise(_MADV_POPULATE_READ)
        return torch.frombuffer(memory, dtype=dtype, offset=skipped).view(shape)


class PickledFile(TensorFile):
    """A PyTorch `.bin` file, mapped into memory; nothing in it is executed (`weights_only`)."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
        self.headers = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""
        tensor = self._tensors[name]
        return tensor if rows is None else tensor[rows]


def open_tensors(path: Path) -> TensorFile:
    """Open a weight file by its suffix.

    Raises:
        CheckpointError: it is missing, truncated, damaged, or holds something else than tensors.
    """
    kind: Any = SafetensorsFile if path.suffix == ".safetensors" else PickledFile
    try:
        return kind(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder is incomplete, fetch it again"
        ) from None
    except Exception as error:  # torch's unpickler fails with whatever the damage leads to
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read ({first_line}): it is truncated or damaged, fetch it again"
        ) from error


def stored_form(family: DenseFamily, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors as its dense family stores them, names behind the layer prefix."""
    # Phi-3 stores q, k and v as one tensor, their rows below each other
    stored = dict(tensors)
    for fused in family.fused:
        stored[fused.stored] = torch.cat([stored.pop(part) for part in fused.parts])
    return stored
