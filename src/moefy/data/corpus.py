"""A corpus as the trainer sees it: sequences of token ids by domain, and some that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from moefy.checkpoint.load import load_tokenizer
from moefy.data.records import open_domains
from moefy.data.shards import RECORD, TokenShards, is_prepared
from moefy.data.tokenise import pack, scattered
from moefy.progress import Progress, ProgressFn, silent

Windows = Int[np.ndarray, "sequences length"]


@dataclass(frozen=True)
class Corpus:
    """Sequences of one length, by domain."""

    train: dict[str, Integer[np.ndarray, "_sequences length"]]
    fingerprint: str  # of what may be read; a run that was stopped goes on with the same
    # returns a domain's first sequences, so many at most, that are never trained on
    heldout: Callable[[str, int], Windows]


def open_corpus(
    data: str | Path,
    model: Path,
    *,
    sequence_length: int,
    max_sequences: int,
    seed: int = 0,
    report: ProgressFn = silent,
) -> Corpus:
    """Open a prepared corpus, or tokenise text as far as a run needs it.

    `data` is a folder that `moefy prepare` wrote, or text (see `records.find_sources`), of which no
    more than `max_sequences` of a domain are tokenised for the tokenizer of `model`: of as many
    documents as possible, at places that `seed` draws (`tokenise.scattered`).

    Raises:
        CorpusError: the text cannot be read, or the corpus is of another tokenizer.
        CheckpointError: the model has no tokenizer.
    """
    if is_prepared(data):
        shards = TokenShards(data)
        shards.require_tokenizer(model)
        return Corpus(
            {name: shards.windows(name, sequence_length) for name in shards.domains},
            # the record names every shard and its hash
            hashlib.sha256((shards.folder / RECORD).read_bytes()).hexdigest(),
            lambda name, count: shards.windows(name, sequence_length, "heldout")[:count].astype(
                np.int64
            ),
        )
    tokenizer = load_tokenizer(model)
    domains = {domain.name: domain for domain in open_domains(data, report=report)}

    # Training text is tokenised now, because the mixture needs the numbers of sequences; held-out
    # text only when a run asks for it.
    windows = {}
    digest = hashlib.sha256()
    for done, name in enumerate(domains):
        report(Progress("tokenise", done, len(domains), name))
        windows[name] = scattered(
            domains[name].documents("train"),
            tokenizer,
            np.random.default_rng((seed, done)),
            sequence_length=sequence_length,
            max_windows=max_sequences,
        )
        digest.update(f"{name} {len(windows[name])} ".encode())
        digest.update(windows[name].tobytes())
    report(Progress("tokenise", len(domains), len(domains)))

    def heldout(name: str, count: int) -> Windows:
        documents = domains[name].documents("heldout")
        return pack(documents, tokenizer, sequence_length=sequence_length, max_windows=count)

    return Corpus(windows, digest.hexdigest(), heldout)


def heldout_of(
    corpus: Corpus, domains: list[str], max_sequences: int
) -> tuple[dict[str, Windows], str]:
    """Return the held-out sequences of the domains that have any, and a note on the others."""
    found = {name: corpus.heldout(name, max_sequences) for name in domains}
    kept = {name: windows for name, windows in found.items() if len(windows)}
    note = (
        f"{', '.join(name for name in found if name not in kept)}: the held-out text (one document "
        "in twenty) is not enough for one sequence, so the loss there cannot be followed: add "
        "documents, lower --sequence-length, or give the domain the weight 0"
    )
    return kept, note if len(kept) < len(found) else ""
