"""Weight files, read lazily.

A file's header is read when it is opened, a tensor when it is asked for; it is in memory only while
somebody holds it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickletools
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moefy.errors import CheckpointError, reason

_MOST_PICKLED_BYTES = 32 << 20  # of the list of tensors in a `.bin` file
_PICKLED_NAMES = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch._utils _rebuild_(tensor_v2|parameter)"
)
_MADV_POPULATE_READ = 22  # of <sys/mman.h>; Python has no name for it
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
_SAFETENSORS_DTYPES = {
    **{"F32": "float32", "BF16": "bfloat16", "F16": "float16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
}


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
        # where a tensor's bytes begin
        self.starts = {name: first_byte + e["data_offsets"][0] for name, e in entries.items()}

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
        start = self.starts[name] + first * row_bytes
        skipped = start % mmap.ALLOCATIONGRANULARITY  # a mapping begins at a page
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < start + size:
                raise CheckpointError(f"{self._path} ends inside {name}: fetch it again")
            memory = mmap.mmap(
                file.fileno(), skipped + size, access=mmap.ACCESS_COPY, offset=start - skipped
            )
        # one call instead of a fault for every few pages; Linux 5.14, and Windows has no madvise
        with suppress(OSError, AttributeError):
            memory.madvise(_MADV_POPULATE_READ)
        return torch.frombuffer(memory, dtype=dtype, offset=skipped).view(shape)


class PickledFile(TensorFile):
    """A PyTorch `.bin` file, mapped into memory; nothing in it is executed (`weights_only`)."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:  # older files would be read into memory
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("its entries are compressed")
            (pickled,) = (e for e in archive.infolist() if e.filename.endswith("/data.pkl"))
            if pickled.file_size > _MOST_PICKLED_BYTES:
                raise ValueError(f"its list of tensors has {pickled.file_size} bytes")
            for opcode, value, _ in pickletools.genops(archive.read(pickled)):
                if "GLOBAL" in opcode.name and not _PICKLED_NAMES.fullmatch(str(value)):
                    raise ValueError(f"it names {value}, which is no part of a tensor")
        self._tensors: dict[str, Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )
        if any(tensor.layout is not torch.strided for tensor in self._tensors.values()):
            raise ValueError("it holds sparse tensors")
        self.headers = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""
        tensor = self._tensors[name]
        return tensor if rows is None else tensor[rows]


def rotated_by_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Return a matrix or bias of queries or keys in transformers' order of rows.

    Mistral and llama.cpp rotate neighbouring rows of a head, transformers those half a head apart.
    """
    pairs = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


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
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}): it is truncated or damaged, fetch it again"
        ) from error
