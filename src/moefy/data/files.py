"""One file of text as a stream of JSON lines, whatever its form and compression.

The libraries that read the forms are given file objects, so memory is bounded by the longest record
and not by the file, nor by what a compressed file may expand to.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moefy.errors import CorpusError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": zstd.ZstdFile,
}
READABLE = ".jsonl, .json, .csv, .txt (also .gz or .zst) or .parquet"
_BLOCK_BYTES = 1 << 18
_LONGEST_BYTES = 1 << 24  # of a record; its tokens take a hundred times the memory
_LARGEST_RATIO = 200  # of compressed text; prose has 3, and logs have 20
_SMALL_BYTES = 1 << 24  # of decompressed text, which may have any ratio
_BOM = "\ufeff".encode()
_NOT_TEXT = {
    rb"\x1f\x8b": "compressed by gzip: let its name end in .gz",
    rb"\x28\xb5\x2f\xfd": "compressed by Zstandard: let its name end in .zst",
    rb"BZh\d1AY|\xfd7zXZ": "compressed in a form that is not read here: use gzip or Zstandard",
    rb"PK\x03\x04|.{257}ustar": "an archive: unpack it",
    rb"PAR1\x15": "a Parquet file: let its name end in .parquet",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text: convert it to UTF-8",
    rb".{0,200}\0": "UTF-16 text or no text at all: convert it to UTF-8",
}
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")


class Meter:
    """Counts and hashes what was read of a file, as it lies on disk."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, block: bytes | memoryview) -> None:
        """Count a block."""
        self.num_bytes += len(block)
        self.sha256.update(block)


def form_of(file: Path) -> str:
    """Return the form that a file's name stands for, one of FORMS, or nothing."""
    *_, form, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    if last in COMPRESSED:
        return form if form in FORMS and form != ".parquet" else ""
    return last if last in FORMS else ""


def read_file(file: Path, keys: list[str], meter: Meter) -> Iterator[bytes]:
    """Iterate over a file's records as JSON lines.

    Args:
        file: a file in one of FORMS.
        keys: keys of the text and of the domain, which a table must have as columns; none: all.
        meter: counts what is read.

    Raises:
        CorpusError: the file cannot be read, is damaged, or has a record of more than 16 MiB.
    """
    form = form_of(file)
    with _opened(file, meter) as content:
        if form == ".parquet":
            for _ in iter(lambda: content.read(_BLOCK_BYTES), b""):
                pass  # the library reads from the end, so the file is hashed before
            yield from encode_table(_parquet(file), str(file), keys)
        elif form == ".csv":
            csv.field_size_limit(_LONGEST_BYTES)
            rows = csv.DictReader(line.decode() for line in _lines(file, content))
            yield from encode_table(rows, str(file), keys)
        elif form == ".txt":
            for text in _paragraphs(file, content):
                yield encode({"text": text})
        elif form == ".json" and content.peek().lstrip().startswith(b"["):
            array = io.TextIOWrapper(content, "utf-8")  # held, so that it outlives its reader
            yield from map(encode, _elements(file, array))
        else:  # a .json file may hold a record a line too, as C4's do
            yield from _lines(file, content)


def encode(row: Any) -> bytes:
    """Return a row as a JSON line."""
    return json.dumps(row, default=str).encode() + b"\n"


def encode_table(rows: Iterable[dict[str, Any]], name: str, keys: list[str]) -> Iterator[bytes]:
    """Iterate over the rows of a table as JSON lines of the columns that are wanted."""
    # A dataset may hold images or long annotations beside the text: they are not encoded.
    columns = sorted({key.partition(".")[0] for key in keys})
    for row in rows:
        if missing := [column for column in columns if column not in row]:
            raise CorpusError(
                f"{name} has no column {missing[0]!r}, only {', '.join(sorted(map(str, row)))}: "
                "name the text by DATA#COLUMN, the domain by --domain-key COLUMN"
            )
        kept = {column: row[column] for column in columns} if columns else row
        if keys and kept.get(keys[0], "") is None:  # how a table says that there is no text
            kept[keys[0]] = ""
        yield encode(kept)


@contextmanager
def _opened(file: Path, meter: Meter) -> Iterator[io.BufferedReader]:
    """Give a file's content, decompressed; say what is wrong with a file that is not readable."""
    try:
        with io.BufferedReader(_Metered(file, meter), _BLOCK_BYTES) as raw:
            source: Any = raw
            if file.suffix.lower() in COMPRESSED:
                # These notice a file that is cut off, and never expand more than is asked for.
                source = _Expanded(file, COMPRESSED[file.suffix.lower()](raw), meter)
            content = io.BufferedReader(source, _BLOCK_BYTES)
            start = content.peek()  # does not move the position
            for magic, what in _NOT_TEXT.items():
                if form_of(file) != ".parquet" and re.match(magic, start, re.DOTALL):
                    raise CorpusError(f"{file} is {what}")
            if start.startswith(_BOM):
                content.read(len(_BOM))
            yield content
    except (EOFError, zlib.error, zstd.ZstdError, gzip.BadGzipFile) as error:
        raise CorpusError(
            f"{file} is a damaged compressed file ({error}): fetch it again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise CorpusError(f"{file} cannot be read: {reason}") from error
    except (ValueError, csv.Error) as error:  # what libraries say of a file in another form
        reason = str(error).partition("\n")[0]
        raise CorpusError(
            f"{file} cannot be read as {form_of(file)[1:]} in UTF-8 ({reason})"
        ) from error


class _Metered(io.FileIO):
    """A file on disk whose blocks are counted when they are read."""

    def __init__(self, file: Path, meter: Meter) -> None:
        super().__init__(file)
        self._meter = meter

    def readinto(self, target: Any) -> int:
        count = super().readinto(target) or 0
        self._meter.add(memoryview(target)[:count])
        return count


class _Expanded(io.RawIOBase):
    """What a compressed file holds, as long as it is not made to expand without end."""

    def __init__(self, file: Path, decompressed: Any, meter: Meter) -> None:
        self._file, self._decompressed, self._meter = file, decompressed, meter
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        count: int = self._decompressed.readinto(target)
        self._num_bytes += count
        if self._num_bytes > max(_SMALL_BYTES, _LARGEST_RATIO * self._meter.num_bytes):
            raise CorpusError(
                f"{self._file} expands more than {_LARGEST_RATIO}-fold, which no text does: "
                "decompress it if you trust it"
            )
        return count


def _lines(file: Path, content: io.BufferedReader) -> Iterator[bytes]:
    while line := content.readline(_LONGEST_BYTES):
        if len(line) == _LONGEST_BYTES:
            raise CorpusError(
                f"{file} has no line end in {_LONGEST_BYTES >> 20} MiB: write one record a line, "
                "and cut longer documents"
            )
        yield line


def _paragraphs(file: Path, content: io.BufferedReader) -> Iterator[str]:
    """Iterate over what blank lines separate: a whole book could not be held out in part."""
    found: list[str] = []
    for line in _lines(file, content):
        if text := line.decode().rstrip():
            found.append(text)
        elif found:
            yield "\n".join(found)
            found = []
    if found:
        yield "\n".join(found)


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise CorpusError(
            f"{file} needs the pyarrow package: pip install 'moefy[datasets]'"
        ) from None
    # a row at a time: a dictionary may hold one text of megabytes, and name it in every row
    for batch in ParquetFile(file).iter_batches(batch_size=1):
        yield from batch.to_pylist()


def _elements(file: Path, text: io.TextIOWrapper) -> Iterator[Any]:
    """Iterate over the elements of a JSON array in the memory of the largest."""
    decoder = json.JSONDecoder()
    content = text.read(_BLOCK_BYTES)
    start, number = content.index("[") + 1, 1
    while True:
        start = _BETWEEN_ELEMENTS.match(content, start).end()  # type: ignore[union-attr]
        if content.startswith("]", start):
            return
        try:
            element, start = decoder.raw_decode(content, start)
        except (ValueError, RecursionError) as error:
            # broken, or not read to its end: doubling keeps the work linear in the file's size
            content, start = content[start:], 0
            more = text.read(max(_BLOCK_BYTES, len(content)))
            if not more or len(content) > _LONGEST_BYTES:
                raise CorpusError(
                    f"{file}, record {number}: no JSON, or the array ends early ({error})"
                ) from error
            content += more
        else:
            yield element
            number += 1
