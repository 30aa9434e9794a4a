"""A suite's results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moefy.report.published import PUBLISHED, SOURCE
from moefy.report.tables import Rows, shown, with_error, with_interval

if TYPE_CHECKING:
    from moefy.evaluation.suite import BenchmarkScore, SuiteResult


def suite_rows(result: SuiteResult) -> Rows:
    """Return header and rows of the scores; average, retention and minutes below.

    After each model that is compared with the reference come its differences from it.
    """
    rows = [["benchmark", "shots", "metric", "items"]]
    for benchmark in result.benchmarks:
        scores = [model.scores.get(benchmark.name) for model in result.models]
        items = next((f"{score.items:,}" for score in scores if score), "–")
        rows.append([benchmark.name, str(benchmark.shots), benchmark.metric, items])
    compared = any(model.against_reference for model in result.models)
    retention = ["retention", "retention above chance"] if compared else []
    rows += [[label, "", "", ""] for label in ("average", *retention, "minutes")]
    for model in result.models:
        names = [benchmark.name for benchmark in result.benchmarks]
        minutes = sum(score.elapsed_s for score in model.scores.values()) / 60
        own = [model.name, *_score_cells(model.scores, names)]
        own += [percent(model.average, model.average_stderr)]
        columns = [[*own, *("" for _ in retention), f"{minutes:.1f}"]]
        if paired := model.against_reference:
            beside = ["difference"]
            beside += [with_interval(paired.differences[name], "+.1f", scale=100) for name in names]
            beside += [with_interval(paired.average, "+.1f", scale=100)]
            kept = (paired.retention, paired.retention_above_chance)
            columns.append([*beside, *(with_interval(k, ".1f", scale=100) for k in kept), ""])
        # Rows are begun above; a model adds one column to them, or two with its differences.
        for column in columns:
            for row, cell in zip(rows, column, strict=True):
                row.append(cell)
    return rows


def published_rows(result: SuiteResult) -> Rows:
    """Return header and rows of the scores with published ones below, a model a row.

    Rows of one cell are headings. There are published rows where a benchmark of the paper was
    measured; their average is shown where exactly its eleven benchmarks were.
    """
    names = [benchmark.name for benchmark in result.benchmarks]
    rows = [["model", "average", *names], ["measured here, percent ± standard error"]]
    for model in result.models:
        average = percent(model.average, model.average_stderr)
        rows.append([model.name, average, *_score_cells(model.scores, names)])
    if not any(benchmark.stock for benchmark in result.benchmarks):
        return rows
    rows.append([f"published, of other sizes, in percent: {SOURCE}"])
    for name, scores in PUBLISHED.items():
        # An average over other benchmarks cannot be compared with the published one.
        whole = set(names) | {"average"} == set(scores)
        cells = [shown(scores.get(benchmark), ".1f") for benchmark in names]
        rows.append([name, f"{scores['average']:.1f}" if whole else "–", *cells])
    return rows


def nll_rows(result: SuiteResult) -> Rows:
    """Return header and rows of −log p of the right answers, where one is scored."""
    rows = [["benchmark", *(model.name for model in result.models)]]
    for benchmark in result.benchmarks:
        scores = [model.scores.get(benchmark.name) for model in result.models]
        cells = [
            with_error(score.gold_nll, score.gold_nll_stderr, ".3f") if score else "–"
            for score in scores
        ]
        rows.append([benchmark.name, *cells])
    return rows


def suite_notes(result: SuiteResult) -> list[str]:
    """Say where the data comes from, how it is not the paper's, and what was cut."""
    notes = []
    if any(benchmark.stock for benchmark in result.benchmarks):
        origin = {"hub": "the hub", "archives": "PyPI archives"}[result.source]
        notes.append(f"The paper's benchmarks are read from {origin}.")
    notes += [f"{name} is not the paper's data: {how}." for name, how in result.differs.items()]
    notes += [
        f"{model.name}: {score.truncated:,} requests of {name} did not fit into its context and "
        "lost their beginning."
        for model in result.models
        for name, score in model.scores.items()
        if score.truncated
    ]
    return notes


def _score_cells(scores: Mapping[str, BenchmarkScore], names: Sequence[str]) -> list[str]:
    found = [scores.get(name) for name in names]
    return [percent(score.value, score.stderr) if score else "–" for score in found]


def percent(value: float | None, error: float | None) -> str:
    """Return a share and its standard error as tables show them, in percent."""
    value, error = (None if part is None else 100 * part for part in (value, error))
    return with_error(value, error, ".1f")
