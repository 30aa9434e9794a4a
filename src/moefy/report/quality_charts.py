"""Quality against what it costs, and the benchmarks, as figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moefy.report.chart import Chart, legend_below, plain_figure

if TYPE_CHECKING:
    from moefy.evaluation.compare import Comparison, Result
    from moefy.evaluation.suite import SuiteResult

_MARKERS = "osD^vPX*"
_Z95 = 1.96
"""Standard errors on either side of a mean that hold 95 % of a normal distribution."""


def quality_charts(comparison: Comparison, suite: SuiteResult | None) -> list[Chart]:
    """Draw the held-out loss, and the benchmarks' average, against what a token costs.

    Args:
        comparison: Of the models.
        suite: Of the same models in the same order, if it was measured; models without an average
            are left out.
    """
    losses, averages = {}, {}
    for result in comparison.results:
        excess = result.excess_loss
        halves = (excess.value - excess.low, excess.high - excess.value) if excess else (0.0, 0.0)
        losses[result.name] = (math.log(result.perplexity), *halves)
    for model in suite.models if suite else []:
        if model.average is not None:
            error = 100 * _Z95 * (model.average_stderr or 0)
            averages[model.name] = (100 * model.average, error, error)
    better = "Lower is better. Bars: 95 % interval of the difference from the dense model."
    kinds = [("quality", "loss (nats per token)", losses, better)]
    if averages:
        better = "Higher is better. Bars: 95 % interval."
        kinds.append(("average", "benchmarks' average (%)", averages, better))
    costs: list[tuple[str, str, Callable[[Result], float | None]]] = [
        ("active", "active parameters (millions)", lambda r: r.cost.active_params / 1e6),
        ("prefill", "prefill speed (tokens/s)", lambda r: r.prefill_tokens_per_s),
        ("decode", "decode speed (tokens/s)", lambda r: r.decode_tokens_per_s),
    ]
    charts = []
    for kind, label, points, caption in kinds:
        for name, cost_label, cost_of in costs:
            found = {result.name: cost_of(result) for result in comparison.results}
            costs_of = {model: cost for model, cost in found.items() if cost is not None}
            if costs_of:
                labels = (cost_label, label)
                charts.append(_scatter(f"{kind}-{name}", labels, costs_of, points, caption))
    return charts


def _scatter(
    name: str,
    labels: tuple[str, str],
    costs: dict[str, float],
    points: dict[str, tuple[float, float, float]],
    caption: str,
) -> Chart:
    """Draw a point for each model: its cost, and its quality with the interval's two halves."""
    figure, axes = plain_figure()
    rows = [["model", *labels, "interval below", "interval above"]]
    for place, (model, x) in enumerate(costs.items()):
        if model not in points:
            continue
        y, below, above = points[model]
        rows.append([model, *(str(value) for value in (x, y, below, above))])
        if math.isfinite(y):  # a broken model's loss may be infinite
            halves, marker = np.array([[below], [above]]), _MARKERS[place % 8]
            color = f"C{place % 10}"
            axes.errorbar(x, y, halves, fmt=marker, c=color, ms=8, capsize=3, label=model)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.margins(x=0.12, y=0.12)
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    legend_below(figure, axes)
    quality, cost = (label.partition(" (")[0] for label in labels[::-1])
    return Chart(name, figure, rows, f"{quality[0].upper()}{quality[1:]} against {cost}. {caption}")


def benchmark_chart(suite: SuiteResult) -> Chart:
    """Draw every score with its 95 % interval, benchmarks down, and what guessing scores."""
    lines = [*(benchmark.name for benchmark in suite.benchmarks), "average"]
    chances = {each.name: each.chance for each in suite.benchmarks}
    models = suite.models
    figure, axes = plain_figure(1.3 + len(lines) * max(0.3, 0.14 * len(models)))
    rows = [["benchmark", "model", "score %", "standard error %", "chance %"]]
    for place, model in enumerate(models):
        found = {name: (score.value, score.stderr) for name, score in model.scores.items()}
        if model.average is not None:
            found["average"] = model.average, model.average_stderr
        shift = (place - (len(models) - 1) / 2) * 0.7 / len(models)
        axes.errorbar(
            [100 * value for value, _ in found.values()],
            [lines.index(name) + shift for name in found],
            xerr=[100 * _Z95 * (error or 0) for _, error in found.values()],
            fmt=_MARKERS[place % 8],
            color=f"C{place % 10}",
            ms=4,
            lw=1,
            label=model.name,
        )
        for name, (value, error) in found.items():
            cells = (value, error, chances.get(name))
            numbers = ("" if cell is None else str(100 * cell) for cell in cells)
            rows.append([name, model.name, *numbers])
    for line, name in enumerate(lines):
        if (chance := chances.get(name)) is not None:
            axes.plot([100 * chance] * 2, [line - 0.4, line + 0.4], color="0.6", linewidth=1.5)
        axes.axhline(line + 0.5, color="0.92", linewidth=0.8, zorder=0)
    axes.plot([], [], color="0.6", linewidth=1.5, label="guessing")
    axes.set_yticks(range(len(lines)), labels=lines)
    axes.set(xlabel="score (%)", ylim=(len(lines) - 0.5, -0.5))
    axes.grid(axis="x", color="0.93", linewidth=0.8)
    legend_below(figure, axes)
    caption = (
        "Scores with 95 % intervals; grey is what guessing scores. Each interval is that of one "
        "model alone: the paired differences in the table tell two models apart more surely."
    )
    return Chart("scores", figure, rows, caption)
