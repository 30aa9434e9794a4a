"""A corpus, or a cluster task's part of one, through the tokenisers into a folder.

The folder holds shards and a journal: how far the sources were read, and how long each stream of
tokens was then. A part that was stopped goes on from its journal; what was written after it is cut
off, so the bytes are those of a run that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.source import BUILTIN, is_hub_name, resolve
from moefy.data.files import Meter
from moefy.data.packing import backend_of
from moefy.data.pool import TokeniserPool
from moefy.data.quality import gopher
from moefy.data.records import find_sources
from moefy.data.shard_writer import TokenWriter
from moefy.data.shards import JOURNAL, RECORD, describe_tokenizer
from moefy.data.tokenise import FILTERED, Lines, Tokenised, Tokeniser
from moefy.errors import CheckpointError, CorpusError, MoefyError, OutputError, UsageError
from moefy.progress import Progress, ProgressFn
from moefy.recipe import PrepareRecipe
from moefy.storage import replace_file, storage_errors

NOTHING_LEFT = "no document is left: all texts are empty, broken or filtered"
_BATCH_BYTES = 1 << 20
_COMMIT_EVERY_S = 10.0
_MAX_DOMAINS = 200
_MAX_EXAMPLES = 20


@dataclass
class Journal:
    """How far a part is: all that a restart needs, and all that its record will say."""

    after: tuple[int, int] = (0, 0)  # source and batch to go on with
    inputs: list[dict[str, Any]] = field(default_factory=list)  # sources that are done
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # see `Tokenised`
    broken: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # see `TokenWriter`

    @property
    def tokens(self) -> int:
        """Token ids written so far."""
        return sum(count["tokens"] + count["heldout_tokens"] for count in self.counts.values())

    def add(self, lines: Lines, done: Tokenised) -> None:
        """Note what came of some lines."""
        self.after = lines.after
        for domain, counts in done.counts.items():
            self.counts.setdefault(domain, Counter()).update(counts)
        self.broken = [*self.broken, *done.broken][:_MAX_EXAMPLES]
        if lines.finished:
            self.inputs.append(lines.finished)


class Part:
    """The sources from rank / num_parts to (rank + 1) / num_parts of a corpus.

    Everything is checked here, before anything is written.

    Attributes:
        identity: what must not change until the part is whole.

    Raises:
        UsageError: text, tokenizer or filter are not usable, or a stream was asked for in parts.
    """

    def __init__(
        self,
        data: str | Path,
        recipe: PrepareRecipe,
        tokenizer: str | Path,
        *,
        rank: int = 0,
        num_parts: int = 1,
        report: ProgressFn,
    ) -> None:
        self._recipe, self._report, self._is_whole = recipe, report, num_parts == 1
        loaded = _load_tokenizer(tokenizer, report)
        described = describe_tokenizer(loaded, str(tokenizer))
        dtype = "uint16" if described["vocab_size"] <= 1 << 16 else "uint32"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        backend = backend_of(loaded, str(tokenizer))
        self._tokeniser = Tokeniser(backend, described["eos"], self._dtype.str, recipe)
        if recipe.filter == "gopher":
            gopher()  # a missing package is told now, and not by the first worker
        sources = find_sources(
            data, text_key=recipe.text_key, domain_key=recipe.domain_key, report=report
        )
        if num_parts > 1 and not Path(data).expanduser().exists():
            raise UsageError(f"{data} is a stream and cannot be cut into parts: store it as files")
        _check_filter_domains(recipe, {source.domain for source in sources})
        first, last = (share * len(sources) // num_parts for share in (rank, rank + 1))
        self._sources = sources[first:last]
        sizes = [source.num_bytes for source in self._sources]
        self._total_bytes = sum(sizes) if all(sizes) else 0  # nobody knows the size of a stream
        listing = json.dumps([(source.name, source.num_bytes) for source in self._sources])
        self.identity = {
            "moefy": version("moefy"),
            "data": str(data),
            "files": hashlib.sha256(listing.encode()).hexdigest(),
            "tokenizer": described,
            "dtype": dtype,
            # a run that stopped at a broken line goes on when these are skipped
            "recipe": recipe.model_dump(mode="json", exclude={"skip_broken"}),
        }

    def write(self, folder: Path, workers: int) -> tuple[int, dict[str, Any]]:
        """Do what is left of the part; return the number of tokens written now, and the record.

        Raises:
            CorpusError: text is broken; what was done before it is kept.
            MoefyError: a worker was killed; what was done is kept.
            StorageError: the disk is full; what was done at the last commit is kept.
        """
        replace_file(folder / "recipe.yaml", self._recipe.to_yaml())
        journal = _read_journal(folder)
        tokens, itemsize = journal.tokens, self._dtype.itemsize
        with storage_errors(folder):
            writer = TokenWriter(
                folder, shard_bytes=self._recipe.shard_tokens * itemsize, sizes=journal.sizes
            )
            with closing(TokeniserPool(workers, self._tokeniser)) as pool:
                try:
                    self._write(pool.tokenise(self._batches(journal.after)), journal, writer)
                except MoefyError:
                    # between two batches; any other error may come within one, which is done again
                    _commit(journal, writer)
                    raise
                _commit(journal, writer)
            shards = writer.shards(itemsize)
        if not shards and self._is_whole:
            raise CorpusError(NOTHING_LEFT)
        record = self._record(journal, shards)
        replace_file(folder / RECORD, json.dumps(record, indent=2) + "\n")
        return journal.tokens - tokens, record

    def _batches(self, after: tuple[int, int]) -> Iterator[Lines]:
        """Read the sources from the one that was not done, and yield what is not done yet."""
        read_bytes = sum(source.num_bytes for source in self._sources[: after[0]])
        for source_idx, source in enumerate(self._sources[after[0] :], start=after[0]):
            meter, first_line, is_empty = Meter(), 1, True
            label = f"{source.name}, {source.unit}"
            for batch_idx, batch in enumerate(_batched(source.read(meter)), start=1):
                content, place = b"".join(batch), (source_idx, batch_idx)
                is_empty = is_empty and not content.strip()
                if place > after:
                    done_bytes = read_bytes + meter.num_bytes
                    yield Lines(label, source.domain, first_line, content, place, done_bytes)
                first_line += len(batch)
            if is_empty and not self._recipe.skip_broken:
                raise CorpusError(
                    f"{source.name} is empty: pass --skip-broken to go on without it, or remove it "
                    "and start again with --overwrite"
                )
            read_bytes += meter.num_bytes
            finished = {
                "file": source.name,
                "bytes": meter.num_bytes,
                "sha256": meter.sha256.hexdigest(),
                "empty": is_empty,
            }
            # no lines, but the record must wait until the lines before it are written
            yield Lines(label, None, first_line, b"", (source_idx + 1, 0), read_bytes, finished)

    def _write(
        self, results: Iterator[tuple[Lines, Tokenised]], journal: Journal, writer: TokenWriter
    ) -> None:
        started = committed = time.perf_counter()
        tokens, start_bytes = journal.tokens, None
        for lines, done in results:
            for stream, ids in done.ids.items():
                writer.append(stream, ids)
            journal.add(lines, done)
            if len(journal.counts) > _MAX_DOMAINS:
                raise CorpusError(
                    f"{lines.label} {lines.first_line}: more than {_MAX_DOMAINS} domains, such as "
                    f"{next(iter(done.counts))!r}: is {self._recipe.domain_key!r} the right "
                    "--domain-key?"
                )
            now = time.perf_counter()
            note = f"{(journal.tokens - tokens) / (now - started):,.0f} tokens/s"
            read = lines.read_bytes
            start_bytes = read if start_bytes is None else start_bytes
            if self._total_bytes and read > start_bytes:
                left_s = (self._total_bytes - read) / (read - start_bytes) * (now - started)
                note += f", {timedelta(seconds=round(left_s))} left"
            self._report(Progress("prepare", read, self._total_bytes or read + 1, note))
            if now - committed >= _COMMIT_EVERY_S:
                _commit(journal, writer)
                committed = time.perf_counter()

    def _record(self, journal: Journal, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Return what moefy.json says of the part."""
        return {
            "moefy": self.identity["moefy"],
            "stage": "prepare",
            "versions": {name: version(name) for name in ("tokenizers", "transformers", "numpy")},
            "tokenizer": self.identity["tokenizer"],
            "dtype": self.identity["dtype"],
            "recipe": self._recipe.model_dump(mode="json"),
            "domains": {
                domain: _domain_record(count) | {"shards": shards.get(domain, [])}
                for domain, count in sorted(journal.counts.items())
                if domain
            },
            "broken_lines": sum(count["broken_lines"] for count in journal.counts.values()),
            "broken_examples": journal.broken,
            "inputs": {"data": self.identity["data"], "files": journal.inputs},
        }


def _batched(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Cut a stream into about a MiB; a run that goes on relies on the same cuts."""
    batch: list[bytes] = []
    num_bytes = 0
    for line in lines:
        batch.append(line)
        num_bytes += len(line)
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _domain_record(count: Counter[str]) -> dict[str, Any]:
    rules = {
        name.removeprefix(FILTERED): number
        for name, number in sorted(count.items())
        if name.startswith(FILTERED)
    }
    sizes = ("documents", "characters", "tokens")
    return {
        **{key: count[key] for key in (*sizes, *(f"heldout_{key}" for key in sizes))},
        "empty": count["empty"],
        "broken_lines": count["broken_lines"],
        "filtered": sum(rules.values()),
        "filtered_by": rules,
    }


def _read_journal(folder: Path) -> Journal:
    try:
        stored = json.loads((folder / JOURNAL).read_text())
        stored["counts"] = {name: Counter(count) for name, count in stored["counts"].items()}
        return Journal(**stored | {"after": tuple(stored["after"])})
    except FileNotFoundError:
        return Journal()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{folder / JOURNAL} is damaged ({error}): pass --overwrite to start again"
        ) from error


def _commit(journal: Journal, writer: TokenWriter) -> None:
    journal.sizes = writer.commit()
    replace_file(writer.folder / JOURNAL, json.dumps(vars(journal)))


def _load_tokenizer(model: str | Path, report: ProgressFn) -> Any:
    if not is_hub_name(model):
        return load_tokenizer(resolve(model, report=report))
    try:  # the tokenizer alone, and not the gigabytes of a model on the hub
        return load_tokenizer(Path(model))
    except CheckpointError as error:
        raise CheckpointError(
            f"{model} is no local folder, and the hub gave no tokenizer of that name: name a model "
            f"folder, use {BUILTIN}, or connect to the hub"
        ) from error


def _check_filter_domains(recipe: PrepareRecipe, of_sources: set[str | None]) -> None:
    known = set((recipe.allowed_names or {}).values()) if None in of_sources else of_sources
    unknown = set(recipe.filter_domains or ()) - known
    if known and unknown:
        raise CorpusError(
            f"filter_domains names {', '.join(sorted(unknown))}; the corpus has "
            f"{', '.join(sorted(map(str, known)))}"
        )
