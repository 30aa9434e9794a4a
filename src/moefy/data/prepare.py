"""Raw text to token shards by domain: `moefy prepare`.

A run is cut into parts (one, unless a cluster runs it), each in a folder of its own in the output.
Once all are whole, their shards are renamed into place and moefy.json is written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from moefy.data.domains import DEMO, HUB
from moefy.data.part import Journal, Part, part_folder, read_journal
from moefy.data.shards import RECORD, is_prepared
from moefy.data.tokenise import FILTERED
from moefy.errors import CorpusError, OutputError
from moefy.progress import ProgressFn, silent
from moefy.recipe import PrepareRecipe, PrepareSettings
from moefy.storage import check_output, put_in_place, replace_file, run_folder, storage_errors

_WHOLE = "{} is a whole corpus already: use it, choose another folder, or pass --overwrite"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did.

    Attributes:
        folder: the corpus; `TokenShards(folder)` reads it.
        record: what its moefy.json says.
        tokens: written by this call; fewer than in the record after a restart.
        workers: processes that tokenised.
        elapsed_s: seconds of this call.
    """

    folder: Path
    record: dict[str, Any]
    tokens: int
    workers: int
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
    shards (see `data.domains.is_held_out`). The result does not depend on the number of workers.

    A call that was stopped goes on when it is made again, with the same result. Memory is bounded
    by the largest document, not by the corpus.

    Args:
        data: a folder of `<domain>.jsonl(.gz, .zst)` files or of `<domain>/` folders of such
            files, `hf:NAME[:CONFIG]`, or `demo`; with the recipe's `domain_key` any folder of
            such files, or one.
        out: the folder to write.
        tokenizer: a model, as `convert` takes it; of a hub's only the tokenizer is fetched.
        workers: processes; None for one per core.
        recipe: a `PrepareRecipe` or a YAML file with its keys.
        overwrite: replace a corpus in `out` when the new one is complete; until then it lies beside
            it, in `.NAME.next`, where the same call goes on. An unfinished one is begun again.
        report: told about progress.
        **settings: single `PrepareRecipe` keys; they override the recipe.

    Raises:
        UsageError: recipe, text, tokenizer or output are not usable; what was done is kept.
        MoefyError: a worker was killed; what was done is kept.
        StorageError: the disk is full; what was done is kept.
    """
    started = time.perf_counter()
    out = Path(out).expanduser()
    choice = PrepareRecipe.build(recipe, **settings)
    folder = run_folder(out, overwrite=overwrite, is_whole=is_prepared)
    is_beside = folder != out
    if overwrite or not _is_unfinished(out):
        if is_prepared(out) and not overwrite:
            raise OutputError(_WHOLE.format(out))
        sources = [Path(tokenizer).expanduser()]
        if not str(data).startswith(HUB) and str(data) != DEMO:
            sources.append(Path(data).expanduser())
        check_output(
            out, overwrite=overwrite, sources=tuple(sources), what="corpus", is_one=_is_corpus
        )
    part = Part(data, folder, choice, tokenizer, rank=0, num_parts=1, report=report)
    if overwrite and not (is_beside and part.is_begun()):
        shutil.rmtree(folder, ignore_errors=True)
    workers = workers or _usable_cores()
    tokens = part.run(workers)
    record = gather(folder)
    put_in_place(folder, out)
    return Prepared(out, record, tokens, workers, time.perf_counter() - started)


def prepare_part(
    data: str | Path,
    out: str | Path,
    rank: int,
    num_parts: int,
    *,
    tokenizer: str | Path,
    workers: int = 1,
    recipe: PrepareRecipe | str | Path | None = None,
    report: ProgressFn = silent,
    **settings: Unpack[PrepareSettings],
) -> int:
    """Do one of the parts of a corpus, for a cluster that does all; `gather` puts them together.

    Part r of n takes the files from r/n to (r+1)/n of the sorted list, so the tokens of the whole
    are the same, in the same order, for any n. Returns the number of tokens written by this call.

    Args:
        data: see `prepare`; files, no stream.
        out: the folder of the whole corpus.
        rank: which part, from 0.
        num_parts: of how many.
        tokenizer: see `prepare`.
        workers: processes of this part.
        recipe: see `prepare`.
        report: told about progress.
        **settings: single `PrepareRecipe` keys.

    Raises:
        UsageError, MoefyError, StorageError: see `prepare`.
    """
    choice = PrepareRecipe.build(recipe, **settings)
    folder = Path(out).expanduser()
    if is_prepared(folder):
        raise OutputError(_WHOLE.format(out))
    part = Part(data, folder, choice, tokenizer, rank=rank, num_parts=num_parts, report=report)
    return part.run(workers)


def gather(out: str | Path) -> dict[str, Any]:
    """Put the finished parts of a corpus together and return its record.

    A call that was stopped may be made again.

    Raises:
        CorpusError: a part is missing or unfinished, parts are of different runs, or there was no
            text in any.
        StorageError: the place cannot be written.
    """
    out = Path(out).expanduser()
    parts = _finished_parts(out)
    itemsize = np.dtype(parts[0][1].identity["dtype"]).itemsize
    shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with storage_errors(out):
        for folder, journal in parts:
            for shard in journal.shards or ():
                domain, split = shard["domain"], shard["split"]
                index = sum(other["split"] == split for other in shards[domain])
                name = f"{domain}/{split}-{index:05d}.bin"
                (out / domain).mkdir(exist_ok=True)
                if (folder / shard["file"]).exists():  # else a call before this one moved it
                    (folder / shard["file"]).replace(out / name)
                shards[domain].append(
                    {
                        "file": name,
                        "split": split,
                        "tokens": shard["bytes"] // itemsize,
                        "sha256": shard["sha256"],
                    }
                )
        record = _record(parts, shards)
        replace_file(out / RECORD, json.dumps(record, indent=2) + "\n")
        for folder, _ in parts:
            shutil.rmtree(folder)
    return record


def _finished_parts(out: Path) -> list[tuple[Path, Journal]]:
    folders = sorted(out.glob("part-*-of-*"))
    if not folders:
        raise CorpusError(f"{out} holds no parts of a corpus: run moefy prepare")
    num_parts = int(folders[0].name.rpartition("-")[2])
    parts, missing = [], []
    for rank in range(num_parts):
        folder = part_folder(out, rank, num_parts)
        journal = read_journal(folder)
        if journal is None or journal.shards is None:
            missing.append(str(rank))
        else:
            parts.append((folder, journal))
    if missing or len(folders) != num_parts:
        raise CorpusError(
            f"{out}: {len(missing)} of {num_parts} parts are not finished "
            f"({', '.join(missing[:10])}), or there are parts of another run: run these again"
        )
    wanted = parts[0][1].identity | {"files": None}
    for folder, journal in parts:
        if journal.identity | {"files": None} != wanted:
            raise CorpusError(
                f"{folder} was prepared with other settings than {parts[0][0]}: delete it and run "
                "it again"
            )
    return parts


def _record(
    parts: list[tuple[Path, Journal]], shards: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, journal in parts:
        for domain, count in journal.counts.items():
            counts[domain].update(count)
    if not any(shards.values()):
        raise CorpusError("no document is left: all texts are empty, broken or filtered")
    first = parts[0][1]
    return {
        "moefy": version("moefy"),
        "stage": "prepare",
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "numpy")},
        "tokenizer": first.identity["tokenizer"],
        "dtype": first.identity["dtype"],
        "recipe": first.recipe,
        "domains": {
            domain: _domain_record(counts[domain]) | {"shards": shards[domain]}
            for domain in sorted(counts)
            if domain
        },
        "broken_lines": sum(count["broken_lines"] for count in counts.values()),
        "broken_examples": [text for _, journal in parts for text in journal.broken][:20],
        "inputs": {
            "data": first.identity["data"],
            "files": [file for _, journal in parts for file in journal.inputs],
        },
    }


def _domain_record(count: Counter[str]) -> dict[str, Any]:
    rules = {
        name.removeprefix(FILTERED): number
        for name, number in sorted(count.items())
        if name.startswith(FILTERED)
    }
    keys = ("documents", "characters", "tokens")
    return {
        **{
            f"{prefix}{key}": count[f"{prefix}{key}"] for prefix in ("", "heldout_") for key in keys
        },
        "empty": count["empty"],
        "broken_lines": count["broken_lines"],
        "filtered": sum(rules.values()),
        "filtered_by": rules,
    }


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_unfinished(out: Path) -> bool:
    return _has_parts(out) and not is_prepared(out)


def _has_parts(out: Path) -> bool:
    return any(out.glob("part-*-of-*"))


def _is_corpus(out: Path) -> bool:
    return is_prepared(out) or _has_parts(out)
