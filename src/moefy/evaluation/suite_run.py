"""One model through the tasks of a suite; every finished task is kept in the cache."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.tasks import TaskManager

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config, side_files
from moefy.errors import CheckpointError, EvaluationError, UsageError
from moefy.evaluation.benchmarks import Benchmark
from moefy.evaluation.harness import (
    STOCK,
    VERSION,
    HarnessModel,
    ItemScores,
    TaskSpec,
    load_tasks,
    run_task,
    task_manager,
)
from moefy.evaluation.suite_data import archive_data
from moefy.experts.lean import register
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn
from moefy.storage import cache_folder, replace_file, storage_errors

_FORMAT = 3  # raise it when what is kept of a task changes, or how it is computed


@dataclass(frozen=True)
class Plan:
    """A benchmark and the harness's tasks that it is made of.

    Attributes:
        benchmark: what to measure.
        tasks: names, with the version of each one's data.
        manager: gives the tasks.
        problem: why it cannot be measured, empty if it can.
    """

    benchmark: Benchmark
    tasks: dict[str, str]
    manager: TaskManager
    problem: str = ""


@dataclass(frozen=True)
class Measured:
    """One model's results.

    Attributes:
        scores: by benchmark, all of its tasks one after the other.
        failed: why a benchmark has none.
    """

    scores: dict[str, ItemScores]
    failed: dict[str, str]


def plan(
    chosen: Sequence[Benchmark | str], folder: Path, *, from_hub: bool, report: ProgressFn
) -> list[Plan]:
    """Return what to run; what comes from the archives is there afterwards.

    Args:
        chosen: the paper's benchmarks, and names of other tasks.
        folder: for the harness's task files, which must stay while the plans are used.
        from_hub: the paper's benchmarks with the hub's data.
        report: told about downloads.

    Raises:
        UsageError: the harness has no such task.
        AssetError: an archive cannot be fetched.
    """
    specs: dict[str, list[TaskSpec]] = {}
    for benchmark in (entry for entry in chosen if isinstance(entry, Benchmark)):
        files = sorted(STOCK.glob(benchmark.stock))
        for file in files:
            name = benchmark.task if len(files) == 1 else file.stem
            data = None if from_hub else archive_data(name, report=report)
            spec = TaskSpec(name, file, benchmark.shots, data)
            specs.setdefault(benchmark.task, []).append(spec)
    ours = task_manager([spec for found in specs.values() for spec in found], folder)
    plans = []
    for entry in chosen:
        if isinstance(entry, Benchmark):
            versions = {
                spec.name: spec.data.version if spec.data else "hub" for spec in specs[entry.task]
            }
            plans.append(Plan(entry, versions, ours))
        else:
            report(Progress("find the harness's tasks", 0, 1))
            plans.append(_other(entry, _manager_of_all()))
            report(Progress("find the harness's tasks", 1, 1))
    return plans


@functools.cache
def _manager_of_all() -> TaskManager:
    return TaskManager()


def _other(name: str, manager: TaskManager) -> Plan:
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise UsageError(f"lm-evaluation-harness {VERSION} has no task {name!r}{hint}")
    try:
        tasks = load_tasks(manager, name)
    except EvaluationError as error:
        return Plan(Benchmark(name, name, 0, "–"), {}, manager, str(error))
    first = next(iter(tasks.values()))
    benchmark = Benchmark(name, name, first.config.num_fewshot, next(iter(first.aggregation())))
    return Plan(benchmark, dict.fromkeys(tasks, "hub"), manager)


def measure(
    folder: Path,
    name: str,
    plans: Sequence[Plan],
    *,
    limit: int | None,
    dtype: str,
    report: ProgressFn,
) -> Measured:
    """Run a model through all plans, skipping what the cache holds.

    Args:
        folder: the model's.
        name: to show.
        plans: what to run.
        limit: items per benchmark.
        dtype: of weights and computation.
        report: told about progress.

    Raises:
        CheckpointError: the model is not usable.
    """
    report(Progress(f"{name}: hash", 0, 1))
    kept = cache_folder() / "scores" / _model_hash(folder)
    report(Progress(f"{name}: hash", 1, 1))
    settings = {"limit": limit, "dtype": dtype, "device": device().type}
    model: HarnessModel | None = None
    measured = Measured({}, {})
    for entry in plans:
        found = []
        clock = _Clock(f"{name}: {entry.benchmark.name}", len(entry.tasks), report)
        try:
            if entry.problem:
                raise EvaluationError(entry.problem)
            for task, version in entry.tasks.items():
                file = kept / f"{task}-{_key(entry.benchmark, version, settings)}.json"
                if not file.is_file():
                    model = model or _open(folder, dtype)
                    scores = _run(model, entry, task, limit, clock)
                    with storage_errors(file):
                        kept.mkdir(parents=True, exist_ok=True)
                    replace_file(file, json.dumps(asdict(scores)))
                found.append(ItemScores(**json.loads(file.read_text())))
                clock.finished()
        except EvaluationError as error:
            measured.failed[entry.benchmark.name] = str(error)
            continue
        measured.scores[entry.benchmark.name] = _joined(found)
    return measured


def _run(
    model: HarnessModel, entry: Plan, task: str, limit: int | None, clock: _Clock
) -> ItemScores:
    (loaded,) = load_tasks(entry.manager, task).values()
    count = None if limit is None else -(-limit // len(entry.tasks))
    return run_task(model, loaded, metric=entry.benchmark.metric, limit=count, share=clock.share)


def _joined(scores: Sequence[ItemScores]) -> ItemScores:
    nll = [each.nll for each in scores]
    return ItemScores(
        scores[0].metric,
        [value for each in scores for value in each.values],
        None if None in nll else [value for each in nll for value in each or []],
        sum(each.truncated for each in scores),
        sum(each.elapsed_s for each in scores),
    )


def check_vocabulary(folder: Path) -> None:
    """Refuse a tokenizer with more tokens than the model has.

    Raises:
        CheckpointError: so it is, or the tokenizer cannot be read.
    """
    tokens, rows = len(load_tokenizer(folder)), read_config(folder)["vocab_size"]
    if tokens > rows:
        raise CheckpointError(
            f"{folder}: its tokenizer has {tokens:,} tokens and its embedding {rows:,}: put the "
            "tokenizer files of the model itself into the folder"
        )


def _open(folder: Path, dtype: str) -> HarnessModel:
    options = {}
    if ffn_shape(read_config(folder)).experts and device().type == "cpu" and dtype == "bfloat16":
        options["experts_implementation"] = register()  # prompts differ in length
    network = load_model(folder, dtype=getattr(torch, dtype), **options).to(device())
    return HarnessModel(network, load_tokenizer(folder))


def _model_hash(folder: Path) -> str:
    """Return a hash of everything that decides a model's answers: weights, config, tokenizer."""
    hashes = fingerprint(folder)
    for file in side_files(folder):
        hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def _key(benchmark: Benchmark, version: str, settings: dict[str, Any]) -> str:
    """Return a hash of everything else that decides a task's result."""
    parts = {
        **settings,
        "shots": benchmark.shots,
        "metric": benchmark.metric,
        "data": version,
        "harness": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "format": _FORMAT,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class _Clock:
    """Reports one benchmark's progress in percent, with the time left.

    Args:
        stage: what is shown.
        tasks: how many the benchmark has.
        report: whom to tell.
    """

    def __init__(self, stage: str, tasks: int, report: ProgressFn) -> None:
        self._stage, self._tasks, self._report = stage, tasks, report
        self._done, self._started_s = 0, time.monotonic()

    def finished(self) -> None:
        """Count a task."""
        self._done += 1
        self._tell(self._done / self._tasks, "")

    def share(self, share: float) -> None:
        """Tell how much of the present task is done, from 0 to 1."""
        done = (self._done + share) / self._tasks
        if 0 < share < 1:
            left_s = (time.monotonic() - self._started_s) * (1 - done) / done
            self._tell(done, f"{_duration(left_s)} left")

    def _tell(self, done: float, note: str) -> None:
        self._report(Progress(self._stage, int(100 * done), 100, note))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
