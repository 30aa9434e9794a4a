"""Quality against what it costs, and the benchmarks, as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from moefy.report.chart import Chart
from moefy.report.tables import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moefy.evaluation.compare import Comparison, Result
    from moefy.evaluation.suite import SuiteResult

_MARKERS = "osD^vPX*"
_Z95 = 1.96
"""Standard errors on either side of a mean that hold 95 % of a normal distribution."""


def quality_charts(comparison: Comparison, suite: SuiteResult | None) -> list[Chart]:
    """Draw perplexity, and the average of a suite, against active parameters and measured speed.

    Args:
        comparison: of the models.
        suite: of the same models in the same order, if it was measured; models without an average
            are left out.
    """
    costs: list[tuple[str, str, Callable[[Result], float | None]]] = [
        ("active", "active parameters (millions)", lambda r: r.cost.active_params / 1e6),
        ("prefill", "prefill speed (tokens/s)", lambda r: r.prefill_tokens_per_s),
        ("decode", "decode speed (tokens/s)", lambda r: r.decode_tokens_per_s),
    ]
    charts = []
    for name, label, cost_of in costs:
        values = {result.name: cost_of(result) for result in comparison.results}
        found = {name: value for name, value in values.items() if value is not None}
        if found:
            charts.append(_perplexity_chart(comparison, name, label, found))
            if suite and any(model.average is not None for model in suite.models):
                charts.append(_average_chart(suite, name, label, found))
    return sorted(charts, key=lambda chart: chart.name.startswith("average"))


def _perplexity_chart(
    comparison: Comparison, cost: str, label: str, costs: dict[str, float]
) -> Chart:
    figure, axes = _small()
    rows = [["model", label, "perplexity", "nats above dense"]]
    dense = next((r for r in comparison.results if r.name == comparison.reference), None)
    shown = {r.name: r.perplexity for r in comparison.results if math.isfinite(r.perplexity)}
    for place, result in enumerate(comparison.results):
        x, y = costs[result.name], result.perplexity
        above = "" if dense is None else str(math.log(y) - math.log(dense.perplexity))
        rows.append([result.name, str(x), str(y), above])
        if result.name in shown:
            axes.plot(x, y, _MARKERS[place % 8], color=f"C{place % 10}", ms=8, label=result.name)
    axes.set(xlabel=label, ylabel="perplexity (log scale)")
    _log_scale(axes, list(shown.values()))
    _finish(figure, axes)
    better = "left" if cost == "active" else "right"
    return Chart(
        f"quality-{cost}",
        figure,
        rows,
        f"Perplexity against {label.partition(' (')[0]}. Lower and further {better} is better; "
        "equal distances upwards are equal differences of loss.",
    )


def _average_chart(suite: SuiteResult, cost: str, label: str, costs: dict[str, float]) -> Chart:
    figure, axes = _small()
    rows = [["model", label, "average %", "standard error %"]]
    for place, model in enumerate(suite.models):
        if model.average is None:
            continue
        x, y, error = costs[model.name], 100 * model.average, model.average_stderr
        rows.append([model.name, str(x), str(y), "" if error is None else str(100 * error)])
        axes.errorbar(
            x,
            y,
            yerr=None if error is None else 100 * _Z95 * error,
            fmt=_MARKERS[place % 8],
            color=f"C{place % 10}",
            markersize=8,
            capsize=3,
            label=model.name,
        )
    axes.set(xlabel=label, ylabel="benchmarks' average (%)")
    _finish(figure, axes)
    better = "left" if cost == "active" else "right"
    return Chart(
        f"average-{cost}",
        figure,
        rows,
        f"The benchmarks' average against {label.partition(' (')[0]}, with its 95 % interval. "
        f"Higher and further {better} is better.",
    )


def benchmark_chart(suite: SuiteResult) -> Chart:
    """Draw every score with its 95 % interval, benchmarks down, and what guessing scores."""
    lines = [*(benchmark.name for benchmark in suite.benchmarks), "average"]
    models = suite.models
    figure = Figure(
        figsize=(5.2, 1.3 + len(lines) * max(0.3, 0.14 * len(models))), layout="constrained"
    )
    axes = figure.subplots()
    rows: Rows = [["benchmark", "model", "score %", "standard error %", "chance %"]]
    chances = {each.name: each.chance for each in suite.benchmarks}
    for place, model in enumerate(models):
        found = {name: (score.value, score.stderr) for name, score in model.scores.items()}
        if model.average is not None:
            found["average"] = model.average, model.average_stderr
        shift = (place - (len(models) - 1) / 2) * 0.7 / len(models)
        for line, (value, error) in ((lines.index(name), each) for name, each in found.items()):
            axes.errorbar(
                100 * value,
                line + shift,
                xerr=None if error is None else 100 * _Z95 * error,
                fmt=_MARKERS[place % 8],
                color=f"C{place % 10}",
                markersize=4,
                linewidth=1,
                label=model.name if line == lines.index(next(iter(found))) else None,
            )
            chance = chances.get(lines[line])
            cells = (value, error, chance)
            numbers = ("" if cell is None else str(100 * cell) for cell in cells)
            rows.append([lines[line], model.name, *numbers])
    for line, name in enumerate(lines):
        if (chance := chances.get(name)) is not None:
            axes.plot([100 * chance] * 2, [line - 0.4, line + 0.4], color="0.6", linewidth=1.5)
    axes.plot([], [], color="0.6", linewidth=1.5, label="guessing")
    for line in range(len(lines) - 1):
        axes.axhline(line + 0.5, color="0.92", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(lines)), labels=lines)
    axes.set(xlabel="score (%)", ylim=(len(lines) - 0.5, -0.5))
    _finish(figure, axes)
    return Chart(
        "scores",
        figure,
        rows,
        "Scores with 95 % intervals; grey is what guessing scores. The intervals hold for each "
        "model alone: two models are told apart by the differences in the table, which are much "
        "surer.",
    )


def _small() -> tuple[Figure, Axes]:
    """Return a figure narrow enough to be read on a phone."""
    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Axes) -> None:
    axes.margins(x=0.12, y=0.12)
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=1)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        frameon=False,
        ncols=max(1, min(len(labels), 44 // (longest + 5))),
    )


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make y logarithmic, with plain numbers at the ticks however small the range is."""
    axes.set_yscale("log")
    axis: Axis = axes.yaxis
    low, high = min(values, default=1.0), max(values, default=1.0)
    if high < 8 * low:
        room = max((high - low) * 0.1, 0.02 * high)
        axes.set_yticks(MaxNLocator(5).tick_values(max(low - room, low / 2), high + room))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 3) if high < 1e3 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
