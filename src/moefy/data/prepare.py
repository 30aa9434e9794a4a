"""Raw text to token shards by domain: `moefy prepare`, on one machine or in the tasks of a cluster.

The tasks of a cluster run at once, so each has a folder and a lock of its own, in OUT.parts beside
OUT; a part is itself a whole corpus. OUT appears when `gather` moves their shards into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from moefy.data.part import NOTHING_LEFT, Part
from moefy.data.records import DEMO, HUB
from moefy.data.shards import JOURNAL, RECORD, is_prepared, read_record
from moefy.errors import CorpusError, OutputError
from moefy.progress import ProgressFn, silent
from moefy.recipe import PrepareRecipe, PrepareSettings
from moefy.run_folder import RunFolder, read_marker
from moefy.storage import replace_file, storage_errors

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
    shards (see `data.domains.is_held_out`). The result does not depend on the number of workers.

    A call that was stopped goes on when it is made again, with the same result. Memory is bounded
    by the largest document, not by the corpus.

    Args:
        data: a file, a folder of `<domain>.jsonl` files or of `<domain>/` folders, a dataset as
            `hf:NAME[:CONFIG]`, or `demo` (see `data.records.find_sources`).
        out: the folder to write.
        tokenizer: a model, as `convert` takes it; of a hub's only the tokenizer is fetched.
        workers: processes; None for one per core.
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
    is_stream = str(data) == DEMO or str(data).startswith(HUB)
    sources = (tokenizer,) if is_stream else (tokenizer, data)
    workers = workers or _usable_cores()
    with _corpus_folder(out, overwrite=overwrite, sources=sources) as run:
        part = Part(data, choice, tokenizer, report=report)
        tokens, record = _write(part, run, workers)
    return Prepared(run.out, record, tokens, workers, time.perf_counter() - started)


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
    """Do part `rank` of a corpus, for a cluster that does all; `gather` puts them together.

    Part r of n takes the files from r/n to (r+1)/n of the sorted list, so the tokens of the whole
    are the same, in the same order, for any n. Returns the number of tokens written by this call.
    Arguments and errors are those of `prepare`; the data must be files, and no stream.
    """
    choice = PrepareRecipe.build(recipe, **settings)
    if is_prepared(out):  # `gather` would refuse it only when all the work is done
        raise OutputError(f"{out} is a whole corpus already: use it, or choose another folder")
    part = Part(data, choice, tokenizer, rank=rank, num_parts=num_parts, report=report)
    folder = _parts_of(out) / f"part-{rank:05d}-of-{num_parts:05d}"
    marker = read_marker(folder)
    if marker and marker.state == "finished" and marker.identity == part.identity:
        return 0  # a cluster starts all tasks again when one has failed
    with _corpus_folder(folder) as run:
        return _write(part, run, workers)[0]


def gather(out: str | Path) -> dict[str, Any]:
    """Put the finished parts of a corpus together and return its record.

    A call that was stopped may be made again.

    Raises:
        CorpusError: a part is missing or unfinished, or parts are of different runs.
        OutputError: `out` is in the way.
        StorageError: the place cannot be written.
    """
    parts_folder = _parts_of(out)
    records = {folder: read_record(folder) for folder in _finished_parts(parts_folder)}
    record, moves = _joined(records)
    if not moves:
        raise CorpusError(NOTHING_LEFT)
    joined = json.dumps(list(records.values())).encode()
    with _corpus_folder(out) as run, storage_errors(run.out):
        run.begin({"parts": hashlib.sha256(joined).hexdigest()})
        shutil.copyfile(next(iter(records)) / "recipe.yaml", run.work / "recipe.yaml")
        # Moved and not copied: a corpus of terabytes has no room for two.
        for source, name in moves:
            (run.work / name).parent.mkdir(exist_ok=True)
            if source.exists():  # else a call before this one moved it
                source.replace(run.work / name)
        replace_file(run.work / RECORD, json.dumps(record, indent=2) + "\n")
        run.finish()
    shutil.rmtree(parts_folder)
    return record


def _corpus_folder(
    out: str | Path, *, overwrite: bool = False, sources: tuple[str | Path, ...] = ()
) -> RunFolder:
    return RunFolder(
        out,
        "corpus",
        overwrite=overwrite,
        sources=sources,
        resumes=True,
        own=(RECORD, "recipe.yaml", "*/train-*.bin", "*/heldout-*.bin"),
        scratch=(JOURNAL,),
    )


def _write(part: Part, run: RunFolder, workers: int) -> tuple[int, dict[str, Any]]:
    run.begin(part.identity)
    if run.was_finished:
        return 0, read_record(run.work)
    done = part.write(run.work, workers)
    run.finish()
    return done


def _parts_of(out: str | Path) -> Path:
    out = Path(out).expanduser()
    return out.with_name(f"{out.name}.parts")


def _finished_parts(folder: Path) -> list[Path]:
    """Return the folders of the parts, in order, if all are there and of one run."""
    found = sorted(folder.glob("part-*-of-*"))
    if not found:
        raise CorpusError(f"{folder} holds no parts of a corpus: run prepare_part")
    num_parts = int(found[0].name.rpartition("-")[2])
    folders = [folder / f"part-{rank:05d}-of-{num_parts:05d}" for rank in range(num_parts)]
    markers = [read_marker(part) for part in folders]
    missing = [str(i) for i, m in enumerate(markers) if m is None or m.state != "finished"]
    if missing or found != folders:
        raise CorpusError(
            f"{folder}: {len(missing)} of {num_parts} parts are not finished "
            f"({', '.join(missing[:10])}), or there are parts of another run: run these again"
        )
    # Each part has files of its own; all else must be the same.
    identities = [marker.identity | {"files": None} for marker in markers if marker]
    for part, identity in zip(folders, identities, strict=True):
        if identity != identities[0]:
            raise CorpusError(
                f"{part} was prepared with other settings than {folders[0]}: delete it and run it "
                "again"
            )
    return folders


def _joined(parts: dict[Path, dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[Path, str]]]:
    """Return the record of all parts as one corpus, and where each shard moves to."""
    whole: dict[str, Any] = {}
    moves = []
    num_shards: Counter[str] = Counter()
    for folder, part in parts.items():
        for domain, found in part["domains"].items():
            for shard in found["shards"]:
                stream = f"{domain}/{shard['split']}"
                name = f"{stream}-{num_shards[stream]:05d}.bin"
                num_shards[stream] += 1
                moves.append((folder / shard["file"], name))
                shard["file"] = name
        whole = _added(whole, part)
    whole["broken_examples"] = whole["broken_examples"][:_MAX_EXAMPLES]
    whole["domains"] = dict(sorted(whole["domains"].items()))
    return whole, moves


def _added(one: Any, other: Any, key: str = "") -> Any:
    """Add two records: counts are summed, lists are joined, and the rest is the first's."""
    if key in ("tokenizer", "recipe", "versions") or isinstance(one, str):
        return one
    if isinstance(one, dict):
        return one | {k: _added(one[k], v, k) if k in one else v for k, v in other.items()}
    return one + other


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
