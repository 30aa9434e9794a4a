"""Text by domain, and the one document in twenty that is held out of training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from moefy.data.records import Source, find_sources, record_of
from moefy.progress import ProgressFn, silent

Side = Literal["train", "heldout", "all"]
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Domain:
    """The documents of one domain, lazily and always in the same order."""

    name: str
    sources: tuple[Source, ...]

    def documents(self) -> Iterator[str]:
        """Iterate over the texts that are not empty.

        Raises:
            CorpusError: a file is damaged, or a record is broken.
        """
        for source in self.sources:
            for where, line in source.records():
                if text := record_of(line, where)[1]:
                    yield text


def open_domains(data: str | Path, *, report: ProgressFn = silent) -> list[Domain]:
    """Return the domains of a corpus (see `records.find_sources`), sorted by name.

    Raises:
        CorpusError: there is no such corpus, or nothing in it.
        AssetError: the demo text cannot be fetched.
    """
    sources = find_sources(data, report=report)
    grouped = groupby(sources, lambda source: str(source.domain))
    return [Domain(name, tuple(found)) for name, found in grouped]


def is_held_out(document: str) -> bool:
    """Say whether a document is kept out of training: one in twenty, chosen by its content.

    The choice depends on nothing but the text, so it survives reordering and resharding, and
    copies of a document are always on the same side.
    """
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def documents_of(domain: Domain, side: Side) -> Iterator[str]:
    """Iterate over the documents of one side of the held-out split."""
    for document in domain.documents():
        if side == "all" or is_held_out(document) == (side == "heldout"):
            yield document
