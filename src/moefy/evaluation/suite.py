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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config, side_files
from moefy.checkpoint.source import resolve
from moefy.errors import CheckpointError, EvaluationError, UsageError
from moefy.evaluation.benchmarks import PAPER_BENCHMARKS, Benchmark
from moefy.evaluation.paired import Paired, compare_paired, standard_error
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, digest

SUITES = {"llama-moe": PAPER_BENCHMARKS}
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
    failed: dict[str, str]  # by benchmark, the reason why it has no score
    average: float | None = None  # of the scores; None unless all are there
    average_stderr: float | None = None
    against_reference: Paired | None = None  # item by item; None for the reference itself


@dataclass(frozen=True)
class SuiteResult:
    """What `evaluate_suite` measured."""

    benchmarks: list[Benchmark]
    limit: int | None  # items per benchmark; None for all
    dtype: str  # of weights and computation
    reference: str | None  # the first dense model, with which the others are compared
    models: list[ModelScores]

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Model, benchmark and reason of every score that is missing."""
        return [(m.name, name, why) for m in self.models for name, why in m.failed.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def evaluate_suite(
    models: str | Path | Sequence[str | Path],
    *,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    dtype: str = "float32",
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> SuiteResult:
    """Measure models on benchmarks through lm-evaluation-harness.

    The result of every task is kept in the cache under the hash of the model, so that an
    interrupted evaluation continues. A benchmark that fails is named in `failed`; the others go on.

    Args:
        models: model folders, or anything `convert` takes as a source.
        suite: "llama-moe", the paper's eleven.
        tasks: names of the harness's tasks, besides or instead of a suite. The paper's tasks run as
            the paper used them, on data out of pinned archives, others as the harness defines them.
        limit: items per benchmark, from the start of its data (of MMLU, spread evenly over its 57
            subjects, at least one of each); None for all.
        dtype: "float32" or "bfloat16", of weights and computation.
        names: to show instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model, a task or a number is not usable, or the harness is not installed.
        AssetError: the data is neither in the cache nor can it be fetched.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    chosen = check_suite(given, suite=suite, tasks=tasks, limit=limit, dtype=dtype)
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
    scores = [model for model, _ in measured]
    chance = {benchmark.name: benchmark.chance for benchmark in benchmarks}
    for i, (model, items) in enumerate(measured):
        # Only the same benchmarks can be compared, so all must have a score on both sides.
        if dense and i != dense[0] and not (model.failed or scores[dense[0]].failed):
            paired = compare_paired(measured[dense[0]][1], items, chance)
            scores[i] = replace(model, against_reference=paired)
    return SuiteResult(
        benchmarks=benchmarks,
        limit=limit,
        dtype=dtype,
        reference=shown[dense[0]] if dense else None,
        models=scores,
    )


def check_suite(
    given: Sequence[str | Path],
    *,
    suite: str | None,
    tasks: Sequence[str],
    limit: int | None,
    dtype: str = "float32",
) -> list[Benchmark | str]:
    """Return the suite's benchmarks and the named tasks, each once, if `evaluate_suite` can start.

    Raises:
        UsageError: see `evaluate_suite`.
    """
    if not given:
        raise UsageError("name at least one model")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 is needed")
    for option, value, allowed in (("dtype", dtype, _DTYPES), ("suite", suite, (None, *SUITES))):
        if value not in allowed:
            names = " and ".join(filter(None, allowed))
            raise UsageError(f"--{option} {value!r}: allowed are {names}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "benchmarks need lm-evaluation-harness, the package lm_eval: pip install 'moefy[eval]'"
        )
    # A task of the paper's is used as in the paper, with its shots and metric.
    known = {benchmark.task: benchmark for benchmark in PAPER_BENCHMARKS}
    chosen = [*(SUITES[suite] if suite else ()), *(known.get(task, task) for task in tasks)]
    if not chosen:
        raise UsageError(f"name a suite ({' or '.join(SUITES)}) or tasks")
    return list(dict.fromkeys(chosen))


def _check_model(folder: Path) -> int:
    """Return the number of experts of a model, 0 for a dense one, if its vocabulary is whole."""
    config = read_config(folder)
    tokens, rows = len(load_tokenizer(folder)), config["vocab_size"]
    if tokens > rows:
        raise CheckpointError(
            f"{folder}: its tokenizer has {tokens:,} tokens and its embedding {rows:,}: put the "
            "tokenizer files of the model itself into the folder"
        )
    return ffn_shape(config).experts


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
    scores, failed = {}, {}
    for plan in plans:
        benchmark = plan.benchmark.name
        stage = f"{name}: {benchmark}"
        try:
            parts = harness.run_plan(plan, model, kept, stage, report=report, **settings)
        except EvaluationError as error:  # the other benchmarks go on
            failed[benchmark] = str(error)
            continue
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
    if failed:  # an average of fewer benchmarks would not compare with anybody's
        return ModelScores(name, scores, failed), items
    average = statistics.fmean(score.value for score in scores.values())
    errors = [score.stderr for score in scores.values() if score.stderr is not None]
    # Benchmarks are independent, so the variances of their means add.
    stderr = math.hypot(*errors) / len(errors) if len(errors) == len(scores) else None
    return ModelScores(name, scores, failed, average, stderr), items
