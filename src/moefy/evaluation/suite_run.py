"""One model through the benchmarks of a suite; every finished task is kept in the cache."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config, side_files
from moefy.errors import CheckpointError, EvaluationError, UsageError
from moefy.evaluation.benchmarks import Benchmark
from moefy.evaluation.harness import (
    VERSION,
    HarnessModel,
    ItemScores,
    all_tasks,
    load_tasks,
    run_task,
    stock_tasks,
    task_config,
)
from moefy.evaluation.suite_data import archive_files, data_version
from moefy.experts.lean import register
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn
from moefy.storage import cache_folder, write_records

_FORMAT = 3  # raise it when what is kept of a task changes, or how it is computed


@dataclass(frozen=True)
class TaskPlan:
    """A benchmark and the harness's tasks that it is made of."""

    benchmark: Benchmark
    tasks: dict[str, str | dict[str, Any]]  # by name, what `load_tasks` takes
    version: str = "hub"  # of the tasks' data
    problem: str = ""  # why it cannot be measured


def plan_tasks(
    chosen: Sequence[Benchmark | str], *, from_hub: bool, report: ProgressFn
) -> list[TaskPlan]:
    """Return what to run for the paper's benchmarks and for names of the harness's tasks.

    The archives' data is unpacked afterwards, unless the paper's benchmarks come from the hub.

    Raises:
        UsageError: the harness has no such task.
        AssetError: an archive cannot be fetched.
    """
    plans = []
    # All data is there before the first model is loaded: a missing archive costs no hours.
    for entry in chosen:
        if isinstance(entry, str):
            plans.append(_plan_other(entry, report))
            continue
        tasks: dict[str, str | dict[str, Any]] = {}
        for task in stock_tasks(entry):
            files = {} if from_hub else archive_files(entry, task, report=report)
            tasks[task] = task_config(entry, task, files)
        plans.append(TaskPlan(entry, tasks, "hub" if from_hub else data_version(entry)))
    return plans


def _plan_other(name: str, report: ProgressFn) -> TaskPlan:
    """Plan a task or a group of tasks as the harness defines it."""
    report(Progress("find the harness's tasks", 0, 1))
    known = all_tasks().all_tasks
    report(Progress("find the harness's tasks", 1, 1))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise UsageError(f"lm-evaluation-harness {VERSION} has no task {name!r}{hint}")
    try:
        tasks = load_tasks(name)
    except EvaluationError as error:
        return TaskPlan(Benchmark(name, name, 0, "–"), {}, problem=str(error))
    # The harness does not say which of a task's metrics counts; its first is the usual one.
    first = next(iter(tasks.values()))
    benchmark = Benchmark(name, name, first.config.num_fewshot, next(iter(first.aggregation())))
    return TaskPlan(benchmark, {task: task for task in tasks})


def measure(
    folder: Path,
    name: str,
    plans: Sequence[TaskPlan],
    *,
    limit: int | None,
    dtype: str,
    report: ProgressFn,
) -> tuple[dict[str, ItemScores], dict[str, str]]:
    """Run a model, called `name`, through all plans, skipping the tasks that the cache holds.

    Returns:
        Scores by benchmark, and by benchmark the reason why it has none.

    Raises:
        CheckpointError: the model is not usable.
    """
    report(Progress(f"{name}: hash", 0, 1))
    kept = cache_folder() / "scores" / _model_hash(folder)
    report(Progress(f"{name}: hash", 1, 1))
    model = functools.cache(lambda: _open(folder, dtype))  # not opened if the cache holds all
    scores, failed = {}, {}
    for plan in plans:
        # Weights and tokenizer are in the folder's name, all else that decides a result in the key.
        key = _key(plan, limit=limit, dtype=dtype, device=device().type)
        parts: list[ItemScores] = []

        def share(part: float, plan: TaskPlan = plan, parts: list[ItemScores] = parts) -> None:
            done, total = int(100 * (len(parts) + part)), 100 * len(plan.tasks)
            report(Progress(f"{name}: {plan.benchmark.name}", done, total))

        try:
            if plan.problem:
                raise EvaluationError(plan.problem)
            for task, config in plan.tasks.items():
                file = kept / f"{task}-{key}.json"
                if not file.is_file():
                    (loaded,) = load_tasks(config).values()  # not a group, so a single task
                    # MMLU's limit is spread over its 57 subjects, at least one item of each.
                    count = None if limit is None else -(-limit // len(plan.tasks))
                    metric = plan.benchmark.metric
                    result = run_task(model(), loaded, metric=metric, limit=count, share=share)
                    write_records(file, [asdict(result)])
                # A result is always read from the file: the second run gives what the first gave.
                parts.append(ItemScores(**json.loads(file.read_text())))
                share(0.0)
        except EvaluationError as error:  # the other benchmarks go on
            failed[plan.benchmark.name] = str(error)
        else:
            scores[plan.benchmark.name] = _joined(parts)
    return scores, failed


def _joined(parts: Sequence[ItemScores]) -> ItemScores:
    # MMLU's score is the mean over all items, so large subjects count more than small ones.
    nll = [part.nll for part in parts]
    return ItemScores(
        parts[0].metric,
        [value for part in parts for value in part.values],
        None if None in nll else [value for values in nll for value in values or []],
        sum(part.truncated for part in parts),
        sum(part.elapsed_s for part in parts),
    )


def check_vocabulary(folder: Path) -> None:
    """Refuse a tokenizer with more tokens than the model has.

    Raises:
        CheckpointError: the tokenizer has more tokens, or cannot be read.
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
        # oneDNN compiles a product for every new shape, and prompts differ in length. These
        # experts round their shapes up.
        options["experts_implementation"] = register()
    network = load_model(folder, dtype=getattr(torch, dtype), **options).to(device())
    return HarnessModel(network, load_tokenizer(folder))


def _model_hash(folder: Path) -> str:
    """Return a hash of everything that decides a model's answers: weights, config, tokenizer."""
    files = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in side_files(folder)
    }
    return _digest(fingerprint(folder) | files)


def _key(plan: TaskPlan, **settings: Any) -> str:
    """Return a hash of everything else that decides a task's result."""
    used = {"shots": plan.benchmark.shots, "metric": plan.benchmark.metric, "data": plan.version}
    versions = [VERSION, torch.__version__, transformers.__version__, _FORMAT]
    return _digest([used, settings, versions])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
