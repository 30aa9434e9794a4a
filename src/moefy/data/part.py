"""One part of a corpus to prepare: its inputs through the workers into its own folder.

The folder holds shards and a journal: how far the inputs were read, and how long each shard was
then. A part that was stopped goes on from its journal; what was written after it is cut off.
"""

from __future__ import annotations

import hashlib
import json
import re
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
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.data.inputs import list_inputs
from moefy.data.jsonl import Meter, batches
from moefy.data.quality import gopher
from moefy.data.shard_writer import TokenWriter
from moefy.data.shards import describe_tokenizer
from moefy.data.tokenise import Batch, Job, Tokenised
from moefy.data.workers import Workers
from moefy.errors import CheckpointError, CorpusError, MoefyError, OutputError, UsageError
from moefy.progress import Progress, ProgressFn
from moefy.recipe import PrepareRecipe
from moefy.storage import check_same_settings, replace_file, storage_errors

_JOURNAL = "journal.json"
_COMMIT_EVERY_S = 10.0
_MAX_DOMAINS = 200
_MAX_EXAMPLES = 20


@dataclass
class Journal:
    """How far a part is: all that a restart needs, and all that the finished corpus says of it.

    Attributes:
        identity: what must not change until the part is whole.
        recipe: of the last run.
        after: input and batch to go on with.
        inputs: records of the inputs that are done.
        counts: by domain; "" holds lines whose domain nobody knows.
        broken: the first messages on skipped lines.
        streams: see `TokenWriter.commit`.
        shards: see `TokenWriter.shards`; None until the part is whole.
    """

    identity: dict[str, Any]
    recipe: dict[str, Any]
    after: tuple[int, int] = (0, 0)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    streams: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, Any]] | None = None

    @property
    def tokens(self) -> int:
        """Token ids written so far."""
        return sum(count["tokens"] + count["heldout_tokens"] for count in self.counts.values())


def read_journal(folder: Path) -> Journal | None:
    """Return a part's journal, or None where there is none yet.

    Raises:
        OutputError: it is damaged.
    """
    try:
        stored = json.loads((folder / _JOURNAL).read_text())
        stored["counts"] = {name: Counter(count) for name, count in stored["counts"].items()}
        return Journal(**stored | {"after": tuple(stored["after"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{folder / _JOURNAL} is damaged ({error}): pass --overwrite to start again"
        ) from error


def part_folder(out: Path, rank: int, num_parts: int) -> Path:
    """Return where a part lies in the output."""
    return out / f"part-{rank:05d}-of-{num_parts:05d}"


class Part:
    """The files from rank / num_parts to (rank + 1) / num_parts of a corpus.

    Everything is checked here, before anything is written.

    Raises:
        UsageError: text, tokenizer or filter are not usable, or a stream was asked for in parts.
    """

    def __init__(
        self,
        data: str | Path,
        out: Path,
        recipe: PrepareRecipe,
        tokenizer: str | Path,
        *,
        rank: int,
        num_parts: int,
        report: ProgressFn,
    ) -> None:
        self._recipe, self._report = recipe, report
        self._folder = part_folder(out, rank, num_parts)
        backend = _load_tokenizer(tokenizer, report)
        described = describe_tokenizer(backend, str(tokenizer))
        dtype = "uint16" if described["vocab_size"] <= 1 << 16 else "uint32"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._job = Job(
            backend.backend_tokenizer.to_str(), described["eos"], self._dtype.str, recipe
        )
        if recipe.filter == "gopher":
            gopher()
        inputs = list_inputs(
            data, domain_key=recipe.domain_key, text_key=recipe.text_key, report=report
        )
        if num_parts > 1 and not Path(data).expanduser().exists():
            raise UsageError(f"{data} is a stream and cannot be cut into parts: store it as files")
        _check_filter_domains(recipe, {source.domain for source in inputs})
        first, last = (share * len(inputs) // num_parts for share in (rank, rank + 1))
        self._inputs = inputs[first:last]
        sizes = [source.num_bytes for source in self._inputs]
        self._total_bytes = sum(sizes) if all(sizes) else 0
        listing = json.dumps([(source.name, source.num_bytes) for source in self._inputs])
        self._identity = {
            "moefy": version("moefy"),
            "data": str(data),
            "files": hashlib.sha256(listing.encode()).hexdigest(),
            "tokenizer": described,
            "dtype": dtype,
            # a run that stopped at a broken line goes on when these are skipped
            "recipe": recipe.model_dump(mode="json", exclude={"skip_broken"}),
        }

    def is_begun(self) -> bool:
        """Say whether there is something of just these settings to go on with."""
        try:
            journal = read_journal(self._folder)
        except OutputError:
            return False
        return journal is not None and journal.identity == self._identity

    def run(self, num_workers: int) -> int:
        """Do what is left of the part and return the number of tokens written.

        Raises:
            CorpusError: broken text; what was done before it is kept.
            MoefyError: a worker was killed; the same.
            StorageError: the disk is full; what was done at the last commit is kept.
        """
        journal = self._open()
        if journal.shards is not None:
            return 0
        tokens = journal.tokens
        with storage_errors(self._folder):
            writer = TokenWriter(
                self._folder,
                shard_bytes=self._recipe.shard_tokens * self._dtype.itemsize,
                committed=journal.streams,
            )
            with closing(writer), closing(Workers(num_workers, self._job)) as pool:
                try:
                    self._write(pool.tokenise(self._batches(journal.after)), journal, writer)
                except MoefyError:
                    self._commit(journal, writer)
                    raise
                journal.shards = writer.shards()
                self._commit(journal, writer)
        return journal.tokens - tokens

    def _open(self) -> Journal:
        journal = read_journal(self._folder) or Journal(self._identity, {})
        check_same_settings(self._folder.parent, journal.identity, self._identity, what="corpus")
        journal.recipe = self._recipe.model_dump(mode="json")
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._folder.parent / "recipe.yaml", self._recipe.to_yaml())
        return journal

    def _batches(self, after: tuple[int, int]) -> Iterator[Batch]:
        """Read the inputs, from their beginnings, and yield what is not done yet."""
        earlier_bytes = sum(source.num_bytes for source in self._inputs[: after[0]])
        for input_idx, source in enumerate(self._inputs[after[0] :], start=after[0]):
            meter, first_line, is_empty = Meter(), 1, True
            contents = batches(source.read(meter), source.name)
            for batch_idx, content in enumerate(contents, start=1):
                is_empty = is_empty and not content.strip()
                if (input_idx, batch_idx) > after:
                    yield Batch(
                        source.name,
                        source.domain,
                        first_line,
                        content,
                        after=(input_idx, batch_idx),
                        read_bytes=earlier_bytes + meter.num_bytes,
                    )
                first_line += content.count(b"\n")
            if is_empty and not self._recipe.skip_broken:
                raise CorpusError(
                    f"{source.name} is empty: pass --skip-broken to go on without it, or remove it "
                    "and start again with --overwrite"
                )
            earlier_bytes += meter.num_bytes
            finished = {
                "file": source.name,
                "bytes": meter.num_bytes,
                "sha256": meter.sha256.hexdigest(),
                "empty": is_empty,
            }
            yield Batch(
                source.name,
                source.domain,
                first_line,
                b"",
                after=(input_idx + 1, 0),
                read_bytes=earlier_bytes,
                finished=finished,
            )

    def _write(
        self, results: Iterator[tuple[Batch, Tokenised]], journal: Journal, writer: TokenWriter
    ) -> None:
        started = committed = time.perf_counter()
        tokens, start_bytes = journal.tokens, None
        for batch, done in results:
            for (domain, split), ids in done.ids.items():
                writer.append(domain, split, ids)
            for domain, counts in done.counts.items():
                journal.counts.setdefault(domain, Counter()).update(counts)
            journal.broken = [*journal.broken, *done.broken][:_MAX_EXAMPLES]
            journal.after = batch.after
            if batch.finished:
                journal.inputs.append(batch.finished)
            now = time.perf_counter()
            if start_bytes is None:
                start_bytes = batch.read_bytes
            speed = (journal.tokens - tokens) / (now - started)
            note = f"{speed:,.0f} tokens/s"
            if self._total_bytes and batch.read_bytes > start_bytes:
                share = (self._total_bytes - batch.read_bytes) / (batch.read_bytes - start_bytes)
                note += f", {timedelta(seconds=round(share * (now - started)))} left"
            total = self._total_bytes or batch.read_bytes + 1
            self._report(Progress("prepare", batch.read_bytes, total, note))
            if len(journal.counts) > _MAX_DOMAINS:
                raise CorpusError(
                    f"{batch.name}: more than {_MAX_DOMAINS} domains, the last {domain!r}: is "
                    f"{self._recipe.domain_key!r} the right --domain-key?"
                )
            if now - committed >= _COMMIT_EVERY_S:
                self._commit(journal, writer)
                committed = time.perf_counter()

    def _commit(self, journal: Journal, writer: TokenWriter) -> None:
        journal.streams = writer.commit()
        replace_file(self._folder / _JOURNAL, json.dumps(vars(journal)))


def _load_tokenizer(model: str | Path, report: ProgressFn) -> Any:
    """Load a tokenizer; of a hub's model nothing else is fetched."""
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not Path(model).exists()
    if not is_on_hub or str(model).endswith(".gguf"):
        return load_tokenizer(resolve(model, report=report))
    try:
        return load_tokenizer(Path(model))
    except CheckpointError as error:
        raise CheckpointError(
            f"{model} is no local folder, and the hub gave no tokenizer of that name: name a model "
            f"folder, use {BUILTIN}, or connect to the hub"
        ) from error


def _check_filter_domains(recipe: PrepareRecipe, of_inputs: set[str | None]) -> None:
    known = set((recipe.allowed_names or {}).values()) if None in of_inputs else of_inputs
    unknown = set(recipe.filter_domains or ()) - known
    if known and unknown:
        raise CorpusError(
            f"filter_domains names {', '.join(sorted(unknown))}; the corpus has "
            f"{', '.join(sorted(str(name) for name in known))}"
        )
