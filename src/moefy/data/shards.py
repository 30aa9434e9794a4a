"""Prepared corpora on disk: token ids by domain and split, memory-mapped.

    OUT/<domain>/train-00000.bin     raw little-endian uint16 (uint32 where the vocabulary needs it)
    OUT/<domain>/heldout-00000.bin   the documents kept out of training (`records.is_held_out`)
    OUT/moefy.json                   what they are; written last, so a folder with it is whole

The shards of a split are one stream of tokens: where it was cut into files means nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Integer
from pydantic import BaseModel, NonNegativeInt

from moefy.data.records import folder_name
from moefy.data.tokenise import backend_of
from moefy.errors import CorpusError, OutputError
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
    domains: dict[str, _Domain]


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
        self._dtype = np.dtype(self.record["dtype"]).newbyteorder("<")
        self._files: dict[tuple[str, str], list[Path]] = {}
        self._starts: dict[tuple[str, str], list[int]] = {}
        self._maps: dict[Path, Integer[np.ndarray, " tokens"]] = {}
        for domain, found in self.record["domains"].items():
            for side in _SIDES:
                shards = [shard for shard in found["shards"] if shard["split"] == side]
                name = f"{folder_name(domain, str(self.folder / RECORD))}/{side}"
                self._files[domain, side] = [
                    self._checked(shard, f"{name}-{i:05d}.bin") for i, shard in enumerate(shards)
                ]
                counts = (shard["tokens"] for shard in shards)
                self._starts[domain, side] = list(accumulate(counts, initial=0))

    def num_tokens(self, domain: str, side: StoredSide = "train") -> int:
        """Return the number of token ids, end tokens included."""
        return self._starts[domain, side][-1]

    def num_sequences(self, domain: str, length: int, side: StoredSide = "train") -> int:
        """Return how many whole sequences of `length` tokens there are."""
        return self.num_tokens(domain, side) // length

    def sequence(
        self, domain: str, idx: int, length: int, side: StoredSide = "train"
    ) -> Int[np.ndarray, " length"]:
        """Return tokens idx × length to (idx + 1) × length of a domain, as int64."""
        if not 0 <= idx < self.num_sequences(domain, length, side):
            raise IndexError(f"{domain!r} has no sequence {idx} of {length} tokens")
        starts = self._starts[domain, side]
        window = np.empty(length, np.int64)
        first, filled = idx * length, 0
        # starts[i] is the first token of shard i, counted over the whole stream
        shard_idx = int(np.searchsorted(starts, first, side="right")) - 1
        while filled < length:  # a window may cross from shard to shard
            file = self._files[domain, side][shard_idx]
            if file not in self._maps:
                self._maps[file] = np.memmap(file, self._dtype, mode="r")
            begin = first + filled - starts[shard_idx]
            ids = self._maps[file][begin : begin + length - filled]
            window[filled : filled + len(ids)] = ids
            filled += len(ids)
            shard_idx += 1
        return window

    def require_tokenizer(self, model: str | Path) -> None:
        """Raise CorpusError if a model has another tokenizer than the one that wrote these ids."""
        from moefy.checkpoint.load import load_tokenizer

        wanted = self.record["tokenizer"]
        found = describe_tokenizer(load_tokenizer(Path(model)), wanted["name"])
        if found != wanted:
            raise CorpusError(
                f"{self.folder} was prepared with the tokenizer of {wanted['name']} "
                f"({_brief(wanted)}); that of {model} is another one ({_brief(found)}): prepare "
                f"the text again with --tokenizer {model}"
            )

    def _checked(self, shard: dict[str, Any], name: str) -> Path:
        if shard["file"] != name:
            raise CorpusError(
                f"{self.folder / RECORD} names the shard {shard['file']!r} where {name!r} belongs: "
                f"{_REMEDY}"
            )
        file = self.folder / name
        wanted = shard["tokens"] * self._dtype.itemsize
        found = file.stat().st_size if file.is_file() else None
        if found != wanted:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise CorpusError(f"{file} {state}, {wanted:,} bytes were written: {_REMEDY}")
        return file


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


def _brief(tokenizer: dict[str, Any]) -> str:
    size, eos = tokenizer["vocab_size"], tokenizer["eos"]
    return f"{size:,} tokens, end {eos}, SHA-256 {tokenizer['sha256'][:12]}…"


class TokenWriter:
    """Appends ids to the shards of many streams; a stream is named DOMAIN/SIDE.

    Every shard but a stream's last has exactly `shard_bytes`.

    Args:
        folder: where `<domain>/<side>-NNNNN.bin` are written.
        shard_bytes: size of a full shard.
        sizes: bytes by stream at the last commit.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, sizes: dict[str, int]) -> None:
        self.sizes = dict(sizes)
        # What was written after the last commit is cut off: its lines will be read again.
        self.folder, self._shard_bytes = folder, shard_bytes
        self._unsynced: set[Path] = set()
        written = (folder.glob(f"*/{side}-{'[0-9]' * 5}.bin") for side in _SIDES)
        for file in chain.from_iterable(written):
            stream, _, index = file.relative_to(folder).with_suffix("").as_posix().rpartition("-")
            committed = sizes.get(stream, 0) - int(index) * shard_bytes
            if committed <= 0:
                file.unlink()
            elif committed < file.stat().st_size:
                os.truncate(file, committed)

    def append(self, stream: str, ids: bytes) -> None:
        """Add whole ids to a stream."""
        rest = memoryview(ids)
        while rest:
            size = self.sizes.get(stream, 0)
            block = rest[: self._shard_bytes - size % self._shard_bytes]
            file = self._file(stream, size // self._shard_bytes)
            file.parent.mkdir(exist_ok=True)
            # Opened for each block: a corpus of many domains would hold hundreds of files open.
            with file.open("ab") as shard:
                shard.write(block)
            self._unsynced.add(file)
            self.sizes[stream] = size + len(block)
            rest = rest[len(block) :]

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk and return the sizes, which may then be written down."""
        for file in self._unsynced:
            with file.open("rb") as shard:
                os.fsync(shard.fileno())  # some file systems find only now that the disk is full
        self._unsynced.clear()
        return dict(self.sizes)

    def shards(self, itemsize: int) -> dict[str, list[dict[str, Any]]]:
        """Return, by domain, what the record says of every shard, once all is done."""
        found: dict[str, list[dict[str, Any]]] = {}
        for stream, size in sorted(self.sizes.items()):
            domain, _, side = stream.rpartition("/")
            for start in range(0, size, self._shard_bytes):
                file = self._file(stream, start // self._shard_bytes)
                wanted = min(self._shard_bytes, size - start)
                if not file.is_file() or file.stat().st_size != wanted:
                    raise OutputError(
                        f"{file} has not the {wanted:,} bytes that were written: somebody else "
                        "changed it; start again with --overwrite"
                    )
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256")
                found.setdefault(domain, []).append(
                    {
                        "file": file.relative_to(self.folder).as_posix(),
                        "split": side,
                        "tokens": wanted // itemsize,
                        "sha256": digest.hexdigest(),
                    }
                )
        return found

    def _file(self, stream: str, index: int) -> Path:
        return self.folder / f"{stream}-{index:05d}.bin"
