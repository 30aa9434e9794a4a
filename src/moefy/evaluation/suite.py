"""The paper's eleven benchmarks, or any task of lm-evaluation-harness, for one model or several."""

from __future__ import annotations

import importlib.util
import math
import statistics
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefy.errors import UsageError
from moefy.evaluation.benchmarks import PAPER_BENCHMARKS, Benchmark
from moefy.evaluation.paired import Paired, compare_paired, standard_error
from moefy.progress import ProgressFn, silent

if TYPE_CHECKING:
    from moefy.evaluation.harness import ItemScores

SUITES = {"llama-moe": PAPER_BENCHMARKS}
_HUB_TIMEOUT_S = 5
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
    average: float | None  # of the scores; None unless all are there
    average_stderr: float | None
    against_reference: Paired | None  # item by item; None for the reference itself


@dataclass(frozen=True)
class SuiteResult:
    """What `evaluate_suite` measured."""

    benchmarks: list[Benchmark]
    source: str  # "hub" or "archives", of the data
    differs: dict[str, str]  # by benchmark, how its data is not the paper's
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
    hub: bool | None = None,
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
            the paper used them, others as the harness defines them.
        limit: items per benchmark, from the start of its data (of MMLU, spread evenly over its 57
            subjects, at least one of each); None for all.
        dtype: "float32" or "bfloat16", of weights and computation.
        hub: take the data from the hub (True), from the archives (False), or from the hub if it
            answers (None). Tasks that are not the paper's are always the hub's.
        names: to show instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model, a task or a number is not usable, or the harness is not installed.
        AssetError: the data is neither in the cache nor can it be fetched.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    chosen = check_suite(given, suite=suite, tasks=tasks, limit=limit, dtype=dtype)

    # These import torch and the harness, which takes seconds.
    from moefy.checkpoint.cost import cost
    from moefy.checkpoint.reader import read_config
    from moefy.checkpoint.source import resolve
    from moefy.evaluation.suite_run import check_vocabulary, measure, plan_tasks

    folders = [resolve(model, report=report) for model in given]
    shown = list(names) if names else [str(model) for model in given]
    for folder in folders:  # before any model is loaded
        check_vocabulary(folder)
    from_hub = _hub_answers() if hub is None else hub
    plans = plan_tasks(chosen, from_hub=from_hub, report=report)
    measured = [
        measure(folder, name, plans, limit=limit, dtype=dtype, report=report)
        for folder, name in zip(folders, shown, strict=True)
    ]
    dense = (i for i, folder in enumerate(folders) if not cost(read_config(folder)).experts)
    base = next(dense, None)
    benchmarks = [plan.benchmark for plan in plans]
    return SuiteResult(
        benchmarks=benchmarks,
        source="hub" if from_hub else "archives",
        differs={b.name: b.differs for b in benchmarks if b.differs and not from_hub},
        limit=limit,
        dtype=dtype,
        reference=None if base is None else shown[base],
        models=[
            _model_scores(
                name, *found, benchmarks, None if base in (None, i) else measured[base][0]
            )
            for i, (name, found) in enumerate(zip(shown, measured, strict=True))
        ],
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
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype!r}: allowed are {' and '.join(_DTYPES)}")
    if suite is not None and suite not in SUITES:
        raise UsageError(f"--suite {suite!r}: allowed are {' and '.join(SUITES)}")
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


def _hub_answers() -> bool:
    """Return whether the hub can be reached and may be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # the user has said not to ask
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S):
            return True
    except OSError:
        return False


def _model_scores(
    name: str,
    items: dict[str, ItemScores],
    failed: dict[str, str],
    benchmarks: list[Benchmark],
    reference: dict[str, ItemScores] | None,
) -> ModelScores:
    scores = {}
    for benchmark, found in items.items():
        scores[benchmark] = BenchmarkScore(
            metric=found.metric,
            value=statistics.fmean(found.values),
            stderr=standard_error(found.values),
            items=len(found.values),
            gold_nll=None if found.nll is None else statistics.fmean(found.nll),
            gold_nll_stderr=None if found.nll is None else standard_error(found.nll),
            truncated=found.truncated,
            elapsed_s=found.elapsed_s,
        )
    if failed:  # an average of fewer benchmarks would not compare with anybody's
        return ModelScores(name, scores, failed, None, None, None)
    errors = [score.stderr for score in scores.values() if score.stderr is not None]
    paired = None
    if reference is not None and reference.keys() == items.keys():
        paired = compare_paired(
            {each: found.values for each, found in reference.items()},
            {each: found.values for each, found in items.items()},
            {benchmark.name: benchmark.chance for benchmark in benchmarks},
        )
    return ModelScores(
        name,
        scores,
        failed,
        average=statistics.fmean(score.value for score in scores.values()),
        # Benchmarks are independent, so the variances of their means add.
        average_stderr=math.hypot(*errors) / len(errors) if len(errors) == len(scores) else None,
        against_reference=paired,
    )
