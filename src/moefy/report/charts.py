"""The figures of a report, each with the numbers that it shows."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from moefy.evaluation.paired import Interval
from moefy.report.tables import Rows, write_csv

if TYPE_CHECKING:
    from moefy.evaluation.compare import Comparison, Result
    from moefy.evaluation.speed import SpeedComparison

# Inches; at this width the letters of a figure can be read on a phone of 390 pixels.
_WIDTH = 4.6
_MARKERS = "osD^vPX*"
_HIGHEST = 2.0
"""Nats above the best model that a figure shows: a broken one would press the others together."""
Log = list[dict[str, Any]]
"""The steps of a run, as `training.state.read_log` returns them."""


@dataclass(frozen=True)
class Chart:
    """A figure of a report."""

    name: str  # of its files, without ending
    figure: Figure
    rows: Rows  # the numbers that it shows
    caption: str  # how to read it

    def __post_init__(self) -> None:
        # A model may be called "a$b$c", which is no formula.
        for text in self.figure.findobj(Text):
            text.set_parse_math(False)

    def write(self, folder: Path) -> None:
        """Write NAME.png and NAME.csv."""
        self.figure.savefig(folder / f"{self.name}.png", dpi=150)
        write_csv(folder / f"{self.name}.csv", self.rows)

    def data_uri(self) -> str:
        """Return the figure as the `src` of a page's image."""
        content = io.BytesIO()
        self.figure.savefig(content, dpi=200)
        return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _plain_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend under the plot, in as many columns as its labels allow."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    # About 44 letters fit beside each other, 5 of them as wide as a marker and its margin.
    columns = max(1, min(len(labels), 44 // (longest + 5)))
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=columns)


def quality_charts(comparison: Comparison) -> list[Chart]:
    """Draw the held-out loss against active parameters, and against measured decoding speed."""
    charts = []
    losses = {result.name: math.log(result.perplexity) for result in comparison.results}
    highest = min(filter(math.isfinite, losses.values()), default=-math.inf) + _HIGHEST
    outside = [f"{name} ({loss:.1f})" for name, loss in losses.items() if not loss <= highest]
    costs: list[tuple[str, str, Callable[[Result], float | None]]] = [
        ("quality-active", "active parameters (millions)", lambda r: r.cost.active_params / 1e6),
        ("quality-decode", "decode speed (tokens/s)", lambda r: r.decode_tokens_per_s),
    ]
    for name, label, cost_of in costs:
        figure, axes = _plain_figure()
        rows = [["model", label, "loss (nats per token)", "interval below", "interval above"]]
        for place, result in enumerate(comparison.results):
            x, y = cost_of(result), losses[result.name]
            if x is None:
                continue
            # The dense model has no difference from itself, hence no interval.
            excess = result.excess_loss or Interval(0.0, 0.0, 0.0)
            below, above = excess.value - excess.low, excess.high - excess.value
            rows.append([result.name, str(x), str(y), str(below), str(above)])
            if y <= highest:
                style: Any = {"fmt": _MARKERS[place % 8], "c": f"C{place % 10}", "ms": 8}
                halves = np.array([[below], [above]])
                axes.errorbar(x, y, halves, capsize=3, label=result.name, **style)
        axes.set(xlabel=label, ylabel="loss (nats per token)")
        axes.margins(x=0.12, y=0.12)
        _legend_below(figure, axes)
        caption = (
            f"Held-out loss against {label.partition(' (')[0]}; lower is better. Bars: 95% "
            "interval of the difference from the dense model."
        )
        if outside:
            caption += f" Too high to be shown: {', '.join(outside)}."
        if len(rows) > 1:
            charts.append(Chart(name, figure, rows, caption))
    return charts


def speed_figure(comparison: SpeedComparison) -> Figure:
    """Draw every speed over the dense model's, with its lowest and highest round."""
    panels: dict[str, list[Any]] = {}
    for each in comparison.speeds:
        where = f"{each.runtime}, {each.dtype}: {each.phase} of {each.batch}"
        panels.setdefault(where, []).append(each)
    height = 1 + 0.9 * len(panels) + 0.25 * len(comparison.speeds)
    figure = Figure(figsize=(8, height), layout="constrained")
    parts = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (where, speeds) in zip(parts, panels.items(), strict=True):
        # a folder's path may be longer than the figure is wide
        names, middle = [each.model[-40:] for each in speeds], [each.of_dense for each in speeds]
        ends = np.abs(np.array([each.spread for each in speeds]).T - middle)
        axes.set_yticks(range(len(names)), names)
        axes.barh(range(len(names)), middle, xerr=ends, color="C0", alpha=0.7, capsize=2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(where, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    parts[-1].set(xlabel="tokens per second over the dense model's")
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def loss_chart(logs: Mapping[str, Log]) -> Chart:
    """Draw the training loss of all runs.

    Args:
        logs: The steps of each run, by model.
    """
    figure, axes = _plain_figure()
    rows = [["model", "step", "tokens", "loss", "running mean"]]
    for place, (name, lines) in enumerate(logs.items()):
        # The first and the last line of `tune` hold a held-out loss and are no steps.
        log = [line for line in lines if "loss" in line]
        losses = [line["loss"] for line in log]
        means = running_mean(losses)
        tokens = [line["tokens"] / 1e3 for line in log]
        axes.plot(tokens, losses, color=f"C{place % 10}", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, means, color=f"C{place % 10}", linewidth=2, label=name)
        rows += [
            [name, *(str(line[key]) for key in ("step", "tokens", "loss")), f"{mean:.5g}"]
            for line, mean in zip(log, means, strict=True)
        ]
    axes.set(xlabel="training tokens (thousands)", ylabel="loss (nats per token)")
    _legend_below(figure, axes)
    caption = (
        "Training loss. The line is a running mean over a quarter of the steps. The thin line is "
        "each step, whose loss depends mostly on the domains that it drew."
    )
    return Chart("loss", figure, rows, caption)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of the quarter of all values that lies around each one, less at the ends."""
    reach = len(values) // 8
    return [fmean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]
