"""A corpus as the trainer sees it: sequences of token ids by domain, and some that are held out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from moefy.checkpoint.load import load_tokenizer
from moefy.data.domains import documents_of, open_domains
from moefy.data.packing import pack
from moefy.data.shards import RECORD, TokenShards, is_prepared
from moefy.errors import CorpusError
from moefy.progress import Progress, ProgressFn, silent

Windows = Int[np.ndarray, "sequences length"]


@runtime_checkable
class Corpus(Protocol):
    """Sequences of one length."""

    @property
    def num_sequences(self) -> dict[str, int]:
        """By domain, to train on."""

    @property
    def fingerprint(self) -> str:
        """Of what may be read; a run that was stopped goes on with the same."""

    def sequence(self, domain: str, sequence_idx: int) -> Int[np.ndarray, " length"]:
        """Return one of them, as int64 ids."""

    def heldout(self, domain: str, max_sequences: int) -> Windows:
        """Return the first sequences that are never trained on, possibly none."""


def open_corpus(
    data: str | Path,
    model: Path,
    *,
    sequence_length: int,
    max_sequences: int,
    report: ProgressFn = silent,
) -> Corpus:
    """Open a prepared corpus, or tokenise text as far as a run needs it.

    Args:
        data: a folder that `moefy prepare` wrote, or anything `domains.open_domains` takes.
        model: the folder whose tokenizer the ids are for.
        sequence_length: tokens per sequence.
        max_sequences: that the run reads; text is tokenised no further.
        report: told about downloads and tokenising.

    Raises:
        CorpusError: the text cannot be read, or the corpus is of another tokenizer.
        CheckpointError: the model has no tokenizer.
    """
    if is_prepared(data):
        shards = TokenShards(data)
        shards.require_tokenizer(model)
        return _Prepared(shards, sequence_length)
    return _Packed(data, model, sequence_length, max_sequences, report)


class _Prepared:
    """Memory-mapped: nothing but the sequences that are asked for is read."""

    def __init__(self, shards: TokenShards, length: int) -> None:
        self._shards, self._length = shards, length
        self.num_sequences = {name: shards.num_sequences(name, length) for name in shards.domains}
        # the record names every input and its hash
        self.fingerprint = hashlib.sha256((shards.folder / RECORD).read_bytes()).hexdigest()

    def sequence(self, domain: str, sequence_idx: int) -> Int[np.ndarray, " length"]:
        return self._shards.sequence(domain, sequence_idx, self._length)

    def heldout(self, domain: str, max_sequences: int) -> Windows:
        count = min(max_sequences, self._shards.num_sequences(domain, self._length, "heldout"))
        found = [
            self._shards.sequence(domain, idx, self._length, "heldout") for idx in range(count)
        ]
        return np.array(found, dtype=np.int64).reshape(-1, self._length)


class _Packed:
    """Tokenised here, and held in memory."""

    def __init__(
        self,
        data: str | Path,
        model: Path,
        length: int,
        max_sequences: int,
        report: ProgressFn,
    ) -> None:
        self._tokenizer, self._length = load_tokenizer(model), length
        self._domains = {domain.name: domain for domain in open_domains(data, report=report)}
        self._windows: dict[str, Windows] = {}
        for done, (name, domain) in enumerate(self._domains.items()):
            report(Progress("tokenise", done, len(self._domains), name))
            self._windows[name] = pack(
                documents_of(domain, "train"),
                self._tokenizer,
                sequence_length=length,
                max_windows=max_sequences,
            )
        report(Progress("tokenise", len(self._domains), len(self._domains)))
        digest = hashlib.sha256()
        for name, windows in self._windows.items():
            digest.update(f"{name} {len(windows)} ".encode())
            digest.update(windows.tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def num_sequences(self) -> dict[str, int]:
        return {name: len(found) for name, found in self._windows.items()}

    def sequence(self, domain: str, sequence_idx: int) -> Int[np.ndarray, " length"]:
        return self._windows[domain][sequence_idx]

    def heldout(self, domain: str, max_sequences: int) -> Windows:
        return pack(
            documents_of(self._domains[domain], "heldout"),
            self._tokenizer,
            sequence_length=self._length,
            max_windows=max_sequences,
        )


def heldout_of(corpus: Corpus, domains: list[str], max_sequences: int) -> dict[str, Windows]:
    """Return each domain's held-out sequences.

    Raises:
        CorpusError: a domain has none.
    """
    found = {name: corpus.heldout(name, max_sequences) for name in domains}
    empty = [name for name, windows in found.items() if not len(windows)]
    if empty:
        raise CorpusError(
            f"{', '.join(empty)}: the held-out text (one document in twenty) is not enough for one "
            "sequence, so the loss there cannot be followed: add documents, lower "
            "--sequence-length, or give the domain the weight 0"
        )
    return found
