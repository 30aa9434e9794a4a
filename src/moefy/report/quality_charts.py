"""Quality against what it costs, and the benchmarks, as figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moefy.evaluation.paired import Interval
from moefy.report.chart import Chart, legend_below, plain_figure

if TYPE_CHECKING:
    from moefy.evaluation.compare import Comparison, Result
    from moefy.evaluation.suite import SuiteResult

_MARKERS = "osD^vPX*"
_Z95 = 1.96  # standard errors on either side of a mean that hold 95% of a normal distribution


def quality_charts(comparison: Comparison) -> list[Chart]:
    """Draw the held-out loss against active parameters, and against measured decoding speed."""
    charts = []
    costs: list[tuple[str, str, Callable[[Result], float | None]]] = [
        ("quality-active", "active parameters (millions)", lambda r: r.cost.active_params / 1e6),
        ("quality-decode", "decode speed (tokens/s)", lambda r: r.decode_tokens_per_s),
    ]
    for name, label, cost_of in costs:
        figure, axes = plain_figure()
        rows = [["model", label, "loss (nats per token)", "interval below", "interval above"]]
        for place, result in enumerate(comparison.results):
            x, y = cost_of(result), math.log(result.perplexity)
            if x is None:
                continue
            # The dense model has no difference from itself, hence no interval.
            excess = result.excess_loss or Interval(0.0, 0.0, 0.0)
            below, above = excess.value - excess.low, excess.high - excess.value
            rows.append([result.name, str(x), str(y), str(below), str(above)])
            if math.isfinite(y):  # a broken model's loss may be infinite
                style: Any = {"fmt": _MARKERS[place % 8], "c": f"C{place % 10}", "ms": 8}
                halves = np.array([[below], [above]])
                axes.errorbar(x, y, halves, capsize=3, label=result.name, **style)
        axes.set(xlabel=label, ylabel="loss (nats per token)")
        axes.margins(x=0.12, y=0.12)
        axes.grid(color="0.93", linewidth=0.8)
        axes.set_axisbelow(True)
        legend_below(figure, axes)
        caption = (
            f"Held-out loss against {label.partition(' (')[0]}; lower is better. Bars: 95% "
            "interval of the difference from the dense model."
        )
        if len(rows) > 1:
            charts.append(Chart(name, figure, rows, caption))
    return charts


def benchmark_chart(suite: SuiteResult) -> Chart:
    """Draw every score with its 95% interval, benchmarks down, and what guessing scores."""
    lines = [*(benchmark.name for benchmark in suite.benchmarks), "average"]
    chances = {each.name: each.chance for each in suite.benchmarks}
    models = suite.models
    figure, axes = plain_figure(1.3 + len(lines) * max(0.3, 0.14 * len(models)))
    rows = [["benchmark", "model", "score %", "standard error %", "chance %"]]
    for place, model in enumerate(models):
        found = {name: (score.value, score.stderr) for name, score in model.scores.items()}
        if model.average is not None:
            found["average"] = model.average, model.average_stderr
        # The models of a benchmark share its line; together they take 0.7 of its height.
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
        # Without this mark a score of 25% looks like a quarter of the way to 100%.
        if (chance := chances.get(name)) is not None:
            axes.plot([100 * chance] * 2, [line - 0.4, line + 0.4], color="0.6", linewidth=1.5)
        axes.axhline(line + 0.5, color="0.92", linewidth=0.8, zorder=0)
    axes.plot([], [], color="0.6", linewidth=1.5, label="guessing")
    axes.set_yticks(range(len(lines)), labels=lines)
    axes.set(xlabel="score (%)", ylim=(len(lines) - 0.5, -0.5))
    axes.grid(axis="x", color="0.93", linewidth=0.8)
    legend_below(figure, axes)
    caption = (
        "Scores with 95% intervals; grey is what guessing scores. Each interval is that of one "
        "model alone: the paired differences in the table tell two models apart more surely."
    )
    return Chart("scores", figure, rows, caption)
