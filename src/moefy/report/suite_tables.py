"""A suite's results as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moefy.report.published import PUBLISHED, SOURCE
from moefy.report.tables import Rows

if TYPE_CHECKING:
    from moefy.evaluation.paired import Interval, Paired
    from moefy.evaluation.suite import ModelScores, SuiteResult


def suite_rows(result: SuiteResult) -> Rows:
    """Return header and rows of the scores; average, retention and minutes below.

    After each model that is compared with the reference come its differences from it.
    """
    header = ["benchmark", "shots", "metric", "items"]
    for model in result.models:
        header += [model.name, "difference"] if model.against_reference else [model.name]
    rows = [header]
    for benchmark in result.benchmarks:
        found = [model.scores.get(benchmark.name) for model in result.models]
        items = next((f"{score.items:,}" for score in found if score), "–")
        row = [benchmark.name, str(benchmark.shots), benchmark.metric, items]
        for model, score in zip(result.models, found, strict=True):
            row.append(percent(score.value, score.stderr) if score else "–")
            if model.against_reference:
                row.append(_interval(model.against_reference.differences[benchmark.name], "+"))
        rows.append(row)
    rows.append(
        _below(
            result,
            "average",
            lambda model: (
                "–" if model.average is None else percent(model.average, model.average_stderr)
            ),
            lambda paired: _interval(paired.average, "+"),
        )
    )
    if any(model.against_reference for model in result.models):
        rows.append(
            _below(result, "retention", lambda _: "", lambda paired: _interval(paired.retention))
        )
        rows.append(
            _below(
                result,
                "retention above chance",
                lambda _: "",
                lambda paired: _interval(paired.retention_above_chance),
            )
        )
    rows.append(_below(result, "minutes", _minutes, lambda _: ""))
    return rows


def published_rows(result: SuiteResult) -> Rows:
    """Return header and rows of the scores with published ones below, a model a row.

    Rows of one cell are headings. There are published rows where a benchmark of the paper was
    measured; their average is shown where its eleven benchmarks were, and nothing else.
    """
    names = [benchmark.name for benchmark in result.benchmarks]
    rows = [["model", "average", *names], ["measured here, percent ± standard error"]]
    for model in result.models:
        average = model.average
        row = [model.name, "–" if average is None else percent(average, model.average_stderr)]
        for name in names:
            score = model.scores.get(name)
            row.append(percent(score.value, score.stderr) if score else "–")
        rows.append(row)
    if not any(benchmark.stock for benchmark in result.benchmarks):
        return rows
    rows.append([f"published, of other sizes, in percent: {SOURCE}"])
    for name, scores in PUBLISHED.items():
        whole = set(names) | {"average"} == set(scores)
        shown = (scores.get(benchmark) for benchmark in names)
        row = [name, f"{scores['average']:.1f}" if whole else "–"]
        rows.append(row + ["–" if score is None else f"{score:.1f}" for score in shown])
    return rows


def nll_rows(result: SuiteResult) -> Rows:
    """Return header and rows of −log p of the right answers, where one is scored."""
    rows = [["benchmark", *(model.name for model in result.models)]]
    for benchmark in result.benchmarks:
        row = [benchmark.name]
        for model in result.models:
            score = model.scores.get(benchmark.name)
            if score is None or score.gold_nll is None:
                row.append("–")
            else:
                row.append(nats(score.gold_nll, score.gold_nll_stderr))
        rows.append(row)
    return rows


def suite_notes(result: SuiteResult) -> list[str]:
    """Say where the data comes from, how it is not the paper's, and what was cut."""
    notes = []
    if any(benchmark.stock for benchmark in result.benchmarks):
        origin = {"hub": "the hub", "archives": "PyPI archives"}[result.source]
        notes.append(f"The paper's benchmarks are read from {origin}.")
    notes += [f"{name} is not the paper's data: {how}." for name, how in result.differs.items()]
    for model in result.models:
        for name, score in model.scores.items():
            if score.truncated:
                notes.append(
                    f"{model.name}: {score.truncated:,} requests of {name} did not fit into its "
                    "context and lost their beginning."
                )
    return notes


def _below(
    result: SuiteResult,
    label: str,
    cell: Callable[[ModelScores], str],
    beside: Callable[[Paired], str],
) -> list[str]:
    row = [label, "", "", ""]
    for model in result.models:
        row.append(cell(model))
        if model.against_reference:
            row.append(beside(model.against_reference))
    return row


def _minutes(model: ModelScores) -> str:
    return f"{sum(score.elapsed_s for score in model.scores.values()) / 60:.1f}"


def percent(value: float, error: float | None) -> str:
    """Return a share and its standard error as tables show them."""
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def nats(value: float, error: float | None) -> str:
    """Return −log p and its standard error as tables show them."""
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    value, low, high = (
        format(100 * number, f"{sign}.1f")
        for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"
