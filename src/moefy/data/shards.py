"""Prepared corpora on disk: token ids by domain and split, memory-mapped.

    OUT/<domain>/train.bin     raw little-endian uint16 (uint32 where the vocabulary needs it)
    OUT/<domain>/heldout.bin   the documents kept out of training (`records.is_held_out`)
    OUT/moefy.json             what they are; written last, so a folder with it is whole

In moefy.json each file is a shard with its split, tokens and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer
from pydantic import BaseModel, Field, NonNegativeInt

from moefy.data.records import folder_name
from moefy.data.tokenise import backend_of
from moefy.errors import CorpusError
from moefy.storage import read_json

RECORD = "moefy.json"
JOURNAL = "journal.json"
StoredSide = Literal["train", "heldout"]
_SIDES = ("train", "heldout")
_REMEDY = "copy the folder again, or run moefy prepare again"


class _Shard(BaseModel):
    file: str
    split: StoredSide
    tokens: NonNegativeInt
    sha256: str


class _Domain(BaseModel):
    shards: list[_Shard]


class _Tokenizer(BaseModel):
    name: str
    sha256: str
    vocab_size: int
    eos: int


class _Record(BaseModel):
    """What a corpus's moefy.json must hold to be read; it says more."""

    dtype: Literal["uint16", "uint32"]
    tokenizer: _Tokenizer
    domains: dict[str, _Domain] = Field(min_length=1)


class TokenShards:
    """A folder that `moefy prepare` wrote.

    Attributes:
        folder: the corpus.
        domains: names, sorted.
        record: what moefy.json says.

    Raises:
        CorpusError: the folder is no whole prepared corpus, or a shard has another size or lies
            outside of it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.record = read_record(self.folder)
        self.domains = sorted(self.record["domains"])
        dtype = np.dtype(self.record["dtype"]).newbyteorder("<")
        empty = np.empty(0, dtype)
        self._ids: dict[tuple[str, str], Integer[np.ndarray, " tokens"]] = {}
        for domain, found in self.record["domains"].items():
            folder_name(domain, str(self.folder / RECORD))
            self._ids |= {(domain, side): empty for side in _SIDES}
            for shard in found["shards"]:
                self._ids[domain, shard["split"]] = self._mapped(domain, shard, dtype)

    def windows(
        self, domain: str, length: int, side: StoredSide = "train"
    ) -> Integer[np.ndarray, "sequences length"]:
        """Return a domain's whole sequences of `length` tokens; each is read when it is taken."""
        ids = self._ids[domain, side]
        return ids[: len(ids) // length * length].reshape(-1, length)

    def require_tokenizer(self, model: str | Path) -> None:
        """Raise CorpusError if a model has another tokenizer than the one that wrote these ids."""
        from moefy.checkpoint.load import load_tokenizer

        wanted = self.record["tokenizer"]
        found = describe_tokenizer(load_tokenizer(Path(model)), wanted["name"])
        if found != wanted:
            sizes = (f"{record['vocab_size']:,} tokens" for record in (wanted, found))
            raise CorpusError(
                f"{self.folder} was prepared with the tokenizer of {wanted['name']}, and that of "
                f"{model} is another one ({' and '.join(sizes)}): prepare the text again with "
                f"--tokenizer {model}"
            )

    def _mapped(
        self, domain: str, shard: dict[str, Any], dtype: np.dtype[Any]
    ) -> Integer[np.ndarray, " tokens"]:
        name = f"{domain}/{shard['split']}.bin"
        if shard["file"] != name:
            raise CorpusError(
                f"{self.folder / RECORD} names the shard {shard['file']!r} where {name!r} belongs: "
                f"{_REMEDY}"
            )
        file, wanted = self.folder / name, shard["tokens"] * dtype.itemsize
        found = file.stat().st_size if file.is_file() else None
        if found != wanted:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise CorpusError(f"{file} {state}, {wanted:,} bytes were written: {_REMEDY}")
        return np.memmap(file, dtype, mode="r") if wanted else np.empty(0, dtype)


def is_prepared(folder: str | Path) -> bool:
    """Say whether a folder holds a whole prepared corpus."""
    file = Path(folder).expanduser() / RECORD
    try:
        return bool(json.loads(file.read_bytes()).get("stage") == "prepare")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def read_record(folder: Path) -> dict[str, Any]:
    """Return what moefy.json says; a CorpusError if the folder is no whole prepared corpus."""
    if is_prepared(folder):
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        read_json(folder / RECORD, _Record, _REMEDY, error=CorpusError)
        return record
    # The journal is gone once a run has finished.
    if (folder / JOURNAL).exists():
        raise CorpusError(
            f"{folder} is an unfinished corpus: run its moefy prepare command again, it goes on "
            "where it stopped"
        )
    raise CorpusError(f"{folder} is no prepared corpus: write one with moefy prepare DATA {folder}")


def describe_tokenizer(tokenizer: Any, name: str) -> dict[str, Any]:
    """Return the record of a tokenizer that the user calls `name`: the same one, the same ids.

    CorpusError says that it is a slow tokenizer, or has no end-of-text token.
    """
    backend = backend_of(tokenizer, name)
    if tokenizer.eos_token_id is None:
        raise CorpusError(
            f"the tokenizer of {name} has no end-of-text token, with which every "
            "prepared document ends: name one as eos_token in its tokenizer_config.json"
        )
    # hashed as the library writes it, not as files: a chat template or a layout changes no id
    backend.no_truncation()
    backend.no_padding()
    return {
        "name": name,
        "sha256": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "vocab_size": 1 + max(tokenizer.get_vocab().values()),
        "eos": tokenizer.eos_token_id,
    }
