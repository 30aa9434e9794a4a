"""Weight files, read lazily: headers when they are opened, a tensor when it is asked for."""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moefy.errors import CheckpointError

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorFile(ABC):
    """An open weight file.

    Attributes:
        headers: dtype and shape by name.
    """

    headers: Mapping[str, tuple[str, tuple[int, ...]]]

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""


class SafetensorsFile(TensorFile):
    """A `.safetensors` file.

    The library checks the header; the data is read into memory of its own instead of being mapped,
    which is faster for whole tensors and leaves no mapped pages behind.
    """

    def __init__(self, path: Path) -> None:
        self.headers = {}
        with safe_open(path, framework="pt") as checked:
            for name in checked.keys():  # noqa: SIM118 - safe_open is no mapping
                view = checked.get_slice(name)
                dtype = view.get_dtype()
                shape = tuple(view.get_shape())
                self.headers[name] = _SAFETENSORS_DTYPES.get(dtype, dtype), shape
        self._path = path
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(header_bytes))
        self._starts = {
            name: 8 + header_bytes + entries[name]["data_offsets"][0] for name in self.headers
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""
        dtype_name, shape = self.headers[name]
        first, last, _ = (rows or slice(None)).indices(shape[0] if shape else 1)
        if shape:
            shape = (last - first, *shape[1:])
        tensor = torch.empty(shape, dtype=getattr(torch, dtype_name))
        row_bytes = tensor[:1].nbytes if shape else 0
        if tensor.nbytes:
            with self._path.open("rb") as file:
                file.seek(self._starts[name] + first * row_bytes)
                memory = tensor.view(-1).view(torch.uint8).numpy().data
                if file.readinto(memory) != tensor.nbytes:
                    raise CheckpointError(f"{self._path} ends inside {name}: fetch it again")
        return tensor


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
