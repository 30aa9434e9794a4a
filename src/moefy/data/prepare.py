"""Raw text to token shards by domain: `moefy prepare`.

OUT holds shards and a journal: how far the sources were read, and how long each stream of tokens
was then. A call that was stopped goes on from the journal; what was written after it is cut off, so
the bytes are those of a call that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.source import BUILTIN, is_hub_name, resolve
from moefy.data.files import Meter
from moefy.data.records import DEMO, HUB, find_sources, split_key
from moefy.data.shards import JOURNAL, RECORD, TokenWriter, describe_tokenizer, read_record
from moefy.data.tokenise import Lines, Tokenised, Tokeniser, backend_of, in_processes
from moefy.errors import CheckpointError, CorpusError, MoefyError, OutputError
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import PrepareRecipe, PrepareSettings
from moefy.run_folder import RunFolder
from moefy.storage import replace_file, storage_errors

_BATCH_BYTES = 1 << 20
_COMMIT_EVERY_S = 10.0
_MAX_DOMAINS = 200
_MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did."""

    folder: Path  # the corpus; `TokenShards(folder)` reads it
    record: dict[str, Any]  # what its moefy.json says
    tokens: int  # written by this call; fewer than in the record after a restart
    workers: int  # processes that tokenised
    elapsed_s: float

    @property
    def tokens_per_s_per_core(self) -> float:
        """Speed of this call, its start included."""
        return self.tokens / self.elapsed_s / self.workers


def prepare(
    data: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path,
    workers: int | None = None,
    recipe: PrepareRecipe | str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **settings: Unpack[PrepareSettings],
) -> Prepared:
    """Tokenise a corpus into memory-mapped shards by domain.

    Every document ends with the tokenizer's end-of-text token, none begins with anything; special
    tokens that stand in the text are read as text. One document in twenty goes to the held-out
    shards (see `data.records.is_held_out`). The result does not depend on the number of workers.

    A call that was stopped goes on when it is made again, with the same result. Memory is bounded
    by the largest document, not by the corpus.

    Args:
        data: a file, a folder of `<domain>.jsonl` files or of `<domain>/` folders, a dataset as
            `hf:NAME[:CONFIG]`, or `demo` (see `data.records.find_sources`).
        out: the folder to write.
        tokenizer: a model, as `convert` takes it; of a hub's only the tokenizer is fetched.
        workers: processes; None for one per core. They are new processes of Python, so a script
            must call this below `if __name__ == "__main__":`.
        recipe: a `PrepareRecipe` or a YAML file with its keys.
        overwrite: replace a corpus in `out` when the new one is complete; until then it lies beside
            it, where the same call goes on. An unfinished one is begun again.
        report: told about progress.
        **settings: single `PrepareRecipe` keys; they override the recipe.

    Raises:
        UsageError: recipe, text, tokenizer or output are not usable; what was done is kept.
        MoefyError: a worker was killed; what was done is kept.
        StorageError: the disk is full; what was done is kept.
    """
    started = time.perf_counter()
    choice = PrepareRecipe.build(recipe, **settings)
    place, _ = split_key(data)
    is_stream = place == DEMO or place.startswith(HUB)
    workers = workers or _usable_cores()
    run = RunFolder(
        out,
        "corpus",
        overwrite=overwrite,
        sources=(tokenizer,) if is_stream else (tokenizer, place),
        resumes=True,
        own=(RECORD, "recipe.yaml", "*/train-*.bin", "*/heldout-*.bin"),
        scratch=(JOURNAL,),
    )
    with run:
        work = _Preparation(data, choice, tokenizer, report)
        run.begin(work.identity)
        tokens = 0
        if not run.was_finished:
            tokens = work.write(run.work, workers)
            run.finish()
        record = read_record(run.out)
    return Prepared(run.out, record, tokens, workers, time.perf_counter() - started)


@dataclass
class _Journal:
    """How far a corpus is: all that a restart needs, and all that its record will say."""

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

    def commit(self, writer: TokenWriter) -> None:
        """Bring the shards to the disk, and then this."""
        self.sizes = writer.commit()
        content = json.dumps(vars(self))
        digest = hashlib.sha256(content.encode()).hexdigest()
        replace_file(writer.folder / JOURNAL, f"{content}\n{digest}\n")

    @classmethod
    def read(cls, folder: Path) -> _Journal:
        """Return a folder's journal, or an empty one."""
        file = folder / JOURNAL
        if not file.exists():
            return cls()
        content, _, digest = file.read_bytes().partition(b"\n")
        if digest.strip() != hashlib.sha256(content).hexdigest().encode():
            raise OutputError(f"{file} is damaged: pass --overwrite to start again")
        stored = json.loads(content)
        stored["counts"] = {name: Counter(count) for name, count in stored["counts"].items()}
        return cls(**stored | {"after": tuple(stored["after"])})


class _Preparation:
    """The sources of a corpus through the tokenisers into a folder.

    Everything is checked here, before anything is written.

    Attributes:
        identity: what must not change until the corpus is whole.
    """

    def __init__(
        self, data: str | Path, recipe: PrepareRecipe, tokenizer: str | Path, report: ProgressFn
    ) -> None:
        self._recipe, self._report = recipe, report
        loaded = _load_tokenizer(tokenizer, report)
        described = describe_tokenizer(loaded, str(tokenizer))
        dtype = "uint16" if described["vocab_size"] <= 1 << 16 else "uint32"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        backend = backend_of(loaded, str(tokenizer))
        self._tokeniser = Tokeniser(backend, described["eos"], self._dtype.str, recipe)
        self._sources = find_sources(
            data, text_key=recipe.text_key, domain_key=recipe.domain_key, report=report
        )
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

    def write(self, folder: Path, workers: int) -> int:
        """Do what is left of the corpus; return the number of tokens written now.

        Raises:
            CorpusError: text is broken; what was done before it is kept.
            MoefyError: a worker was killed; what was done is kept.
            StorageError: the disk is full; what was done at the last commit is kept.
        """
        replace_file(folder / "recipe.yaml", self._recipe.to_yaml())
        journal = _Journal.read(folder)
        tokens, itemsize = journal.tokens, self._dtype.itemsize
        with storage_errors(folder):
            writer = TokenWriter(
                folder, shard_bytes=self._recipe.shard_tokens * itemsize, sizes=journal.sizes
            )
            batches = self._batches(journal.after)
            with closing(in_processes(self._tokeniser, batches, workers)) as results:
                try:
                    self._write(results, journal, writer)
                except MoefyError:
                    # between two batches; any other error may come within one, which is done again
                    journal.commit(writer)
                    raise
                journal.commit(writer)
            shards = writer.shards(itemsize)
        if not shards:
            raise CorpusError("no document is left: all texts are empty or broken")
        record = self._record(journal, shards)
        replace_file(folder / RECORD, json.dumps(record, indent=2) + "\n")
        return journal.tokens - tokens

    def _batches(self, after: tuple[int, int]) -> Iterator[Lines]:
        """Read the sources from the one that was not done, and yield what is not done yet."""
        read_bytes = sum(source.num_bytes for source in self._sources[: after[0]])
        for source_idx, source in enumerate(self._sources[after[0] :], start=after[0]):
            meter, first_line, is_empty = Meter(), 1, True
            place = f"{source.name}, {source.unit}", source.domain, source.text_key
            for batch_idx, batch in enumerate(_batched(source.read(meter)), start=1):
                content, here = b"".join(batch), (source_idx, batch_idx)
                is_empty = is_empty and not content.strip()
                if here > after:
                    yield Lines(*place, first_line, content, here, read_bytes + meter.num_bytes)
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
            yield Lines(*place, first_line, b"", (source_idx + 1, 0), read_bytes, finished)

    def _write(
        self, results: Iterator[tuple[Lines, Tokenised]], journal: _Journal, writer: TokenWriter
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
                journal.commit(writer)
                committed = time.perf_counter()

    def _record(self, journal: _Journal, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Return what moefy.json says."""
        sizes = ("documents", "characters", "tokens")
        keys = (*sizes, *(f"heldout_{key}" for key in sizes), "empty", "broken_lines")
        return {
            "moefy": self.identity["moefy"],
            "stage": "prepare",
            "versions": {name: version(name) for name in ("tokenizers", "transformers", "numpy")},
            "tokenizer": self.identity["tokenizer"],
            "dtype": self.identity["dtype"],
            "recipe": self._recipe.model_dump(mode="json"),
            "domains": {
                domain: {key: count[key] for key in keys} | {"shards": shards.get(domain, [])}
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


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
