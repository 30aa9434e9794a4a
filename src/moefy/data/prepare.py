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
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.source import BUILTIN, is_hub_name, resolve
from moefy.data import records
from moefy.data.files import Meter
from moefy.data.records import Source, find_sources, is_held_out
from moefy.data.shards import JOURNAL, RECORD, describe_tokenizer, read_record
from moefy.data.tokenise import backend_of, encode_documents
from moefy.errors import CheckpointError, CorpusError, MoefyError, OutputError
from moefy.progress import Progress, ProgressFn, silent
from moefy.run_folder import RunFolder
from moefy.storage import replace_file, storage_errors, sync
from moefy.version import __version__

_BATCH_BYTES = 1 << 20
_COMMIT_EVERY_S = 10.0
_MAX_DOMAINS = 200
_MAX_EXAMPLES = 20
SLIMPAJAMA_KEY = "meta.redpajama_set_name"
SLIMPAJAMA_NAMES = {
    "RedPajamaCommonCrawl": "cc",
    "RedPajamaC4": "c4",
    "RedPajamaGithub": "github",
    "RedPajamaWikipedia": "wikipedia",
    "RedPajamaBook": "book",
    "RedPajamaArXiv": "arxiv",
    "RedPajamaStackExchange": "stackexchange",
}
"""SlimPajama's domains, as its lines name them, and moefy's names for them."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did."""

    folder: Path  # the corpus; `TokenShards(folder)` reads it
    record: dict[str, Any]  # what its moefy.json says
    tokens: int  # written by this call; fewer than in the record after a restart
    elapsed_s: float


def prepare(
    data: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path,
    domain_key: str | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
) -> Prepared:
    """Tokenise a corpus into memory-mapped shards by domain.

    Every document ends with the tokenizer's end-of-text token, none begins with anything; special
    tokens that stand in the text are read as text. One document in twenty goes to the held-out
    shards (see `data.records.is_held_out`).

    A call that was stopped goes on when it is made again, with the same result. Memory is bounded
    by the largest document, not by the corpus.

    Args:
        data: a file, a folder of `<domain>.jsonl` files or of `<domain>/` folders, a dataset as
            `hf:NAME[:CONFIG]`, or `demo` (see `data.records.find_sources`).
        out: the folder to write.
        tokenizer: a model, as `convert` takes it; of a hub's only the tokenizer is fetched.
        domain_key: key of a record that names its domain, such as SlimPajama's
            `meta.redpajama_set_name`; dots lead into objects. None: files and folders are domains.
        skip_broken: skip broken records and count them, instead of stopping at the first.
        workers: threads of the tokenizer, which this process then keeps; None for one per core.
        overwrite: replace a corpus in `out` when the new one is complete; until then it lies beside
            it, where the same call goes on. An unfinished one is begun again.
        report: told about progress.

    Raises:
        UsageError: text, tokenizer or output are not usable; what was done is kept.
        StorageError: the disk is full; what was done is kept.
    """
    started = time.perf_counter()
    if workers:  # the tokenizers library reads these at its first batch
        os.environ["TOKENIZERS_PARALLELISM"] = str(workers > 1).lower()
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    place, _ = records.split_key(data)
    is_stream = place == records.DEMO or place.startswith(records.HUB)
    run = RunFolder(
        out,
        "corpus",
        overwrite=overwrite,
        sources=(tokenizer,) if is_stream else (tokenizer, place),
        resumes=True,
        own=(RECORD, "*/train.bin", "*/heldout.bin"),
        scratch=(JOURNAL,),
    )
    with run:
        work = _Preparation(data, domain_key, tokenizer, skip_broken, report)
        run.begin(work.identity)
        tokens = 0
        if not run.was_finished:
            tokens = work.write(run.work)
            run.finish()
        record = read_record(run.out)
    return Prepared(run.out, record, tokens, time.perf_counter() - started)


@dataclass
class _Journal:
    """How far a corpus is: all that a restart needs, and all that its record will say."""

    after: tuple[int, int] = (0, 0)  # source, and batches of it that are done
    inputs: list[dict[str, Any]] = field(default_factory=list)  # sources that are done
    # by domain; "" holds records whose domain cannot be known
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # the first messages on records left out
    sizes: dict[str, int] = field(default_factory=dict)  # bytes written, by "domain/side"

    @property
    def tokens(self) -> int:
        """Token ids written so far."""
        return sum(count["tokens"] + count["heldout_tokens"] for count in self.counts.values())

    def commit(self, folder: Path) -> None:
        """Bring the shards to the disk, and then this."""
        for stream in self.sizes:
            sync(folder / f"{stream}.bin")
        content = json.dumps(vars(self))
        digest = hashlib.sha256(content.encode()).hexdigest()
        replace_file(folder / JOURNAL, f"{content}\n{digest}\n")

    @classmethod
    def read(cls, folder: Path) -> _Journal:
        """Return a folder's journal, or an empty one; cut off what was written after it."""
        file, journal = folder / JOURNAL, cls()
        if file.exists():
            content, _, digest = file.read_bytes().partition(b"\n")
            if digest.strip() != hashlib.sha256(content).hexdigest().encode():
                raise OutputError(f"{file} is damaged: pass --overwrite to start again")
            stored = json.loads(content)
            stored["counts"] = {name: Counter(count) for name, count in stored["counts"].items()}
            journal = cls(**stored | {"after": tuple(stored["after"])})
        for shard in folder.glob("*/*.bin"):
            stream = shard.relative_to(folder).with_suffix("").as_posix()
            if stream not in journal.sizes:
                shard.unlink()
            elif journal.sizes[stream] < shard.stat().st_size:
                os.truncate(shard, journal.sizes[stream])
        return journal


class _Preparation:
    """The sources of a corpus through the tokenizer into a folder.

    Everything is checked here, before anything is written.

    Attributes:
        identity: what must not change until the corpus is whole.
    """

    def __init__(
        self,
        data: str | Path,
        domain_key: str | None,
        tokenizer: str | Path,
        skip_broken: bool,
        report: ProgressFn,
    ) -> None:
        self._domain_key, self._skip_broken, self._report = domain_key, skip_broken, report
        loaded = _load_tokenizer(tokenizer, report)
        described = describe_tokenizer(loaded, str(tokenizer))
        dtype = "uint16" if described["vocab_size"] <= 1 << 16 else "uint32"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._backend, self._eos = backend_of(loaded, str(tokenizer)), described["eos"]
        self._sources = find_sources(data, domain_key=domain_key, report=report)
        listing = json.dumps([(source.name, source.num_bytes) for source in self._sources])
        self.identity = {
            "moefy": __version__,
            "data": str(data),
            "files": hashlib.sha256(listing.encode()).hexdigest(),
            "tokenizer": described,
            "dtype": dtype,
            # not skip_broken: a run that stopped at a broken record goes on when it is skipped
            "domain_key": domain_key,
        }

    def write(self, folder: Path) -> int:
        """Do what is left of the corpus; return the number of tokens written now."""
        self._folder = folder
        with storage_errors(folder):
            journal = self._journal = _Journal.read(folder)
            tokens = journal.tokens
            try:
                self._write_sources()
            except MoefyError:
                # between two batches; any other error may come within one, which is done again
                journal.commit(folder)
                raise
            journal.commit(folder)
            shards = self._shards()
        if not shards:
            raise CorpusError("no document is left: all texts are empty or broken")
        replace_file(folder / RECORD, json.dumps(self._record(shards), indent=2) + "\n")
        return journal.tokens - tokens

    def _write_sources(self) -> None:
        """Write the tokens of all batches that are not done."""
        journal, first = self._journal, self._journal.after[0]
        sizes = [source.num_bytes for source in self._sources]
        total = sum(sizes) if all(sizes) else 0  # nobody knows the size of a stream
        read, tokens = sum(sizes[:first]), journal.tokens
        started = committed = time.perf_counter()
        for source_idx, source in enumerate(self._sources[first:], start=first):
            meter, first_line, is_empty = Meter(), 1, True
            for batch_idx, batch in enumerate(_batched(source.read(meter)), start=1):
                is_empty = is_empty and not any(line.strip() for line in batch)
                now, here = time.perf_counter(), read + meter.num_bytes
                if (source_idx, batch_idx) > journal.after:
                    self._take(source, first_line, batch)
                    journal.after = (source_idx, batch_idx)
                    note = f"{(journal.tokens - tokens) / (now - started):,.0f} tokens/s"
                    self._report(Progress("prepare", here, total or here + 1, note))
                first_line += len(batch)
                if now - committed >= _COMMIT_EVERY_S:
                    journal.commit(self._folder)
                    committed = now
            if is_empty and not self._skip_broken:
                raise CorpusError(
                    f"{source.name} is empty: pass --skip-broken to go on without it, or remove it "
                    "and start again with --overwrite"
                )
            read += meter.num_bytes
            digest = meter.sha256.hexdigest()
            journal.inputs.append(
                {"file": source.name, "bytes": meter.num_bytes, "sha256": digest, "empty": is_empty}
            )
            journal.after = (source_idx + 1, 0)
        self._report(Progress("prepare", read, read))

    def _take(self, source: Source, first_line: int, lines: list[bytes]) -> None:
        """Tokenise a batch and write it; CorpusError says, before anything, what is broken."""
        texts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        broken = []
        for number, line in enumerate(lines, start=first_line):
            if not line.strip():
                continue
            where, domain = f"{source.name}, {source.unit} {number}", source.domain
            try:
                record, text = records.record_of(line, where, source.text_key)
                if domain is None:
                    domain = self._domain(record, where)
            except CorpusError as error:
                if not self._skip_broken:
                    raise CorpusError(
                        f"{error}; pass --skip-broken to go on without such lines, or mend it and "
                        "start again with --overwrite"
                    ) from error
                counts[domain or ""]["broken_lines"] += 1
                broken.append(str(error))
                continue
            if text:
                texts[domain, "heldout" if is_held_out(text) else "train"].append(text)
            else:
                counts[domain]["empty"] += 1
        journal = self._journal
        if len({*journal.counts, *counts, *(domain for domain, _ in texts)}) > _MAX_DOMAINS:
            raise CorpusError(
                f"{source.name}, {source.unit} {first_line}: more than {_MAX_DOMAINS} domains, "
                f"such as {next(iter(texts))[0]!r}: is {self._domain_key!r} the right --domain-key?"
            )
        for (domain, side), documents in texts.items():
            ids = encode_documents(self._backend, self._eos, documents)
            file, content = self._folder / f"{domain}/{side}.bin", np.array(ids, dtype=self._dtype)
            file.parent.mkdir(exist_ok=True)
            # opened for each batch: a corpus of many domains would hold hundreds of files open
            with file.open("ab") as shard:
                shard.write(content.tobytes())
            stream = f"{domain}/{side}"
            journal.sizes[stream] = journal.sizes.get(stream, 0) + content.nbytes
            prefix = "" if side == "train" else "heldout_"
            counts[domain][f"{prefix}documents"] += len(documents)
            counts[domain][f"{prefix}characters"] += sum(map(len, documents))
            counts[domain][f"{prefix}tokens"] += len(ids)
        for domain, count in counts.items():
            journal.counts.setdefault(domain, Counter()).update(count)
        journal.broken = [*journal.broken, *broken][:_MAX_EXAMPLES]

    def _domain(self, record: dict[str, Any], where: str) -> str:
        key = self._domain_key or ""
        try:
            found = records.field(record, key)
        except (KeyError, TypeError):
            raise CorpusError(f"{where}: there is no domain in {key!r}") from None
        if key != SLIMPAJAMA_KEY:
            return records.folder_name(found, f"{where}, {key!r}")
        if not isinstance(found, str) or found not in SLIMPAJAMA_NAMES:
            allowed = ", ".join(SLIMPAJAMA_NAMES)
            raise CorpusError(f"{where}: {key!r} is {found!r}; allowed are {allowed}")
        return SLIMPAJAMA_NAMES[found]

    def _shards(self) -> dict[str, list[dict[str, Any]]]:
        """Return, by domain, file, split, tokens and SHA-256 of every shard, once all is done."""
        found: dict[str, list[dict[str, Any]]] = {}
        for stream, size in sorted(self._journal.sizes.items()):
            domain, _, side = stream.rpartition("/")
            file = self._folder / f"{stream}.bin"
            if file.stat().st_size != size:
                raise OutputError(
                    f"{file} has not the {size:,} bytes that were written: somebody else changed "
                    "it; start again with --overwrite"
                )
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found.setdefault(domain, []).append(
                {
                    "file": f"{stream}.bin",
                    "split": side,
                    "tokens": size // self._dtype.itemsize,
                    "sha256": digest,
                }
            )
        return found

    def _record(self, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Return what moefy.json says."""
        journal = self._journal
        sizes = ("documents", "characters", "tokens")
        keys = (*sizes, *(f"heldout_{key}" for key in sizes), "empty", "broken_lines")
        return {
            "moefy": self.identity["moefy"],
            "stage": "prepare",
            "versions": {name: version(name) for name in ("tokenizers", "transformers", "numpy")},
            "tokenizer": self.identity["tokenizer"],
            "dtype": self.identity["dtype"],
            "domain_key": self.identity["domain_key"],
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
