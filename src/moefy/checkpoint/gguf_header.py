"""The header of a GGUF file, every length in it checked against the file before it is believed.

gguf's own reader follows a damaged count for as long as the count says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from moefy.errors import CheckpointError

_SCALARS = "BbHhIif?s[QqD"  # by type number; "s" a string, "[" an array, "D" a double
_MAX_STRING = 1 << 24


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says it holds.

    Attributes:
        fields: values by key; an array is represented by its length.
        shapes: of the tensors by name, rows first as torch has them.
    """

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> GgufHeader:
    """Read and check a header; no tensor is read.

    Raises:
        CheckpointError: the file is no GGUF, or it is truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).header()
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is no readable GGUF file ({error}): it is truncated or damaged, fetch it again"
        ) from error


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def header(self) -> GgufHeader:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._scalar("I")) not in (2, 3):
            raise ValueError(f"version {version}, known are 2 and 3")
        num_tensors, num_fields = self._count(24), self._count(13)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            if key in fields:
                raise ValueError(f"{key} is there twice")
            fields[key] = self._value(self._scalar("I"))
        infos = list(self._tensor_infos(num_tensors))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        for name, shape, kind, offset in infos:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if shape[-1] % block or prod(shape) == 0:
                raise ValueError(f"{name} has the shape {list(shape)}")
            if start + offset + prod(shape) // block * block_bytes > self._size:
                raise ValueError(f"the file ends inside {name}")
        shapes = {name: shape for name, shape, *_ in infos}
        if len(shapes) != num_tensors:
            raise ValueError("a tensor is there twice")
        return GgufHeader(fields, shapes)

    def _tensor_infos(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for _ in range(count):
            name, num_dims = self._string(), self._scalar("I")
            if not 1 <= num_dims <= 4:
                raise ValueError(f"{name} has {num_dims} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
            yield name, shape, self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int) -> Any:
        code = _SCALARS[kind : kind + 1]
        if code == "s":
            return self._string()
        if code != "[":
            return self._scalar(code.replace("D", "d"))
        item = _SCALARS[(kind := self._scalar("I")) : kind + 1]
        if item == "[":
            raise ValueError("an array of arrays")
        length = self._count(1)
        if item == "s":
            for _ in range(length):
                self._string()
        else:
            self._bytes(length * struct.calcsize(item.replace("D", "d")), keep=False)
        return length

    def _string(self) -> str:
        length = self._count(1)
        if length > _MAX_STRING:
            raise ValueError(f"a string of {length} bytes")
        return self._bytes(length).decode()

    def _count(self, item_bytes: int) -> int:
        """Read a number of items of at least this size each."""
        count: int = self._scalar("Q")
        if count * item_bytes > self._size - self._file.tell():
            raise ValueError(f"a count of {count} in {self._size} bytes")
        return count

    def _scalar(self, code: str) -> Any:
        if not code:
            raise ValueError("a value of unknown type")
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _bytes(self, count: int, *, keep: bool = True) -> bytes:
        if count > self._size - self._file.tell():
            raise ValueError("it ends inside its header")
        if keep:
            return self._file.read(count)
        self._file.seek(count, 1)
        return b""
