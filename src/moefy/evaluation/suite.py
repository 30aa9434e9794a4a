"""The paper's eleven benchmarks, or any task of lm-evaluation-harness, for one model or several.

The harness is an extra and takes seconds to import, so `evaluation.harness` is imported late.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config, side_files
from moefy.checkpoint.source import resolve
from moefy.errors import UsageError
from moefy.evaluation.benchmarks import PAPER_BENCHMARKS, Benchmark
from moefy.evaluation.paired import Paired, compare_paired, standard_error
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, digest

PAPER = "llama-moe"
"""Stands for the paper's eleven among names of tasks."""
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class BenchmarkScore:
    """One model on one benchmark: the mean of the harness's metric over the items."""

    metric: str
    value: float
    stderr: float | None  # None for a single item
    items: int
    # Mean −log p of the right answer after its question, nats; None where the harness asks for
    # none. It moves before the accuracy does.
    gold_nll: float | None
    gold_nll_stderr: float | None
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
        tasks: names of the harness's tasks; "llama-moe" stands for the paper's eleven. The paper's
            run as the paper used them, on data out of pinned archives, others as the harness
            defines them, on the hub's.
        limit: items per benchmark, from the start of its data (of MMLU, spread evenly over its 57
            subjects, at least one of each); None for all.
        dtype: "float32" or "bfloat16", of weights and computation.
        names: to show instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model, a task or a number is not usable, or the harness is not installed.
        AssetError: the data is neither in the cache nor can it be fetched.
        EvaluationError: the hub has no such data, a task does not fit into the accelerator's
            memory, or its metric is no mean over items; finished tasks are kept.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    chosen = check_suite(given, tasks=tasks, limit=limit, dtype=dtype)
    from moefy.evaluation import harness

    folders = [resolve(model, report=report) for model in given]
    shown = list(names) if names else [str(model) for model in given]
    dense = [i for i, folder in enumerate(folders) if not _check_model(folder)]
    # All data is there before the first model is loaded: a missing archive costs no hours.
    plans = harness.plan_tasks(chosen, report=report)
    benchmarks = [plan.benchmark for plan in plans]
    measured = [
        _measure(folder, name, plans, report, limit=limit, dtype=dtype)
        for folder, name in zip(folders, shown, strict=True)
    ]
    chance = {benchmark.name: benchmark.chance for benchmark in benchmarks}
    scores = [
        replace(model, against_reference=compare_paired(measured[dense[0]][1], items, chance))
        if dense and i != dense[0]
        else model
        for i, (model, items) in enumerate(measured)
    ]
    return SuiteResult(benchmarks, limit, dtype, shown[dense[0]] if dense else None, scores)


def check_suite(
    given: Sequence[str | Path], *, tasks: Sequence[str], limit: int | None, dtype: str
) -> list[Benchmark | str]:
    """Return the benchmarks and other tasks of some names, each once, if they can be measured.

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
    # A task of the paper's is used as in the paper, with its shots and metric.
    known = {benchmark.task: benchmark for benchmark in PAPER_BENCHMARKS}
    chosen: list[Benchmark | str] = []
    for task in tasks:
        chosen += PAPER_BENCHMARKS if task == PAPER else [known.get(task, task)]
    return list(dict.fromkeys(chosen))


def _check_model(folder: Path) -> int:
    """Return the number of experts of a model, 0 for a dense one, if its vocabulary is whole."""
    load_tokenizer(folder)
    return ffn_shape(read_config(folder)).experts


def _measure(
    folder: Path, name: str, plans: Sequence[Any], report: ProgressFn, **settings: Any
) -> tuple[ModelScores, dict[str, list[float]]]:
    """Return a model's scores by `harness.TaskPlan`s, and by benchmark the metric of every item."""
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
    for plan in plans:
        benchmark = plan.benchmark.name
        stage = f"{name}: {benchmark}"
        parts = harness.run_plan(plan, model, kept, stage, report=report, **settings)
        # MMLU's score is the mean over all items, so large subjects count more than small ones.
        values = items[benchmark] = [value for part in parts for value in part.values]
        with_nll = all(part.nll for part in parts)
        nll = [value for part in parts for value in part.nll or []] if with_nll else []
        scores[benchmark] = BenchmarkScore(
            metric=plan.benchmark.metric,
            value=statistics.fmean(values),
            stderr=standard_error(values),
            items=len(values),
            gold_nll=statistics.fmean(nll) if nll else None,
            gold_nll_stderr=standard_error(nll),
            truncated=sum(part.truncated for part in parts),
            elapsed_s=sum(part.elapsed_s for part in parts),
        )
    average = statistics.fmean(score.value for score in scores.values())
    errors = [score.stderr for score in scores.values() if score.stderr is not None]
    # Benchmarks are independent, so the variances of their means add.
    stderr = math.hypot(*errors) / len(errors) if len(errors) == len(scores) else None
    return ModelScores(name, scores, average, stderr), items
