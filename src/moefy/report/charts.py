"""The figures of a report, each with the numbers that it shows."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter

from moefy.evaluation.paired import Interval
from moefy.report.tables import Rows, k_rows, write_csv
from moefy.storage import storage_errors
from moefy.training.state import read_log

if TYPE_CHECKING:
    from moefy.evaluation.compare import Comparison, Result
    from moefy.evaluation.routing import RoutingResult

# Inches; at this width the letters of a figure can be read on a phone of 390 pixels.
_WIDTH = 4.6
_REFERENCES = re.compile(r'(\bid="|\bhref="#|url\(#)')
_MARKERS = "osD^vPX*"
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

    def svg(self) -> str:
        """Return an SVG element; the same numbers give the same bytes."""
        text = io.StringIO()
        # Without a date and with a fixed salt, a report that is made again differs in its numbers.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with mpl.rc_context({"svg.hashsalt": "moefy"}):
            self.figure.savefig(text, format="svg", metadata=nothing)
        element = text.getvalue()[text.getvalue().index("<svg") :]
        # Matplotlib numbers the ids of every figure alike; a page holds several figures.
        return _REFERENCES.sub(rf"\g<1>{self.name}-", element)


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
    costs: list[tuple[str, str, Callable[[Result], float | None]]] = [
        ("quality-active", "active parameters (millions)", lambda r: r.cost.active_params / 1e6),
        ("quality-decode", "decode speed (tokens/s)", lambda r: r.decode_tokens_per_s),
    ]
    for name, label, cost_of in costs:
        figure, axes = _plain_figure()
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
        _legend_below(figure, axes)
        caption = (
            f"Held-out loss against {label.partition(' (')[0]}; lower is better. Bars: 95% "
            "interval of the difference from the dense model."
        )
        if len(rows) > 1:
            charts.append(Chart(name, figure, rows, caption))
    return charts


def k_chart(result: RoutingResult) -> Chart:
    """Draw the loss by number of chosen experts, a line per model; a ring is the saved number."""
    figure, axes = _plain_figure()
    for place, model in enumerate(result.models):
        color = f"C{place % 10}"
        losses = {at.k: at.loss for at in model.quality}
        axes.plot(list(losses), list(losses.values()), "o-", color=color, ms=4, label=model.name)
        axes.plot(model.active, losses[model.active], "o", color=color, ms=9, fillstyle="none")
    if result.reference_loss is not None:
        label = f"{result.reference} (dense)"
        axes.axhline(result.reference_loss, color="0.4", linestyle="--", linewidth=1, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="routed experts chosen per token", ylabel="loss (nats per token)")
    _legend_below(figure, axes)
    caption = (
        "Loss with another number of experts chosen per token than the model was saved with. A "
        "ring marks the saved number, the dashed line is the dense model."
    )
    return Chart("routing-k", figure, k_rows(result), caption)


def draw_training(folder: Path) -> None:
    """Draw the training that lies in a folder of `train`, as PNG files there.

    Raises:
        StorageError: The files cannot be written.
    """
    for chart in training_charts({folder.name: read_log(folder)}):
        with storage_errors(folder):
            chart.figure.savefig(folder / f"{chart.name}.png", dpi=150)


def training_charts(logs: Mapping[str, Log]) -> list[Chart]:
    """Draw the loss of all runs in one figure, and the mixture of each where it changed.

    Args:
        logs: The steps of each run, by model.
    """
    # The first and the last line of `tune` hold a held-out loss and are no steps.
    steps = {name: [line for line in log if "loss" in line] for name, log in logs.items()}
    charts = [_loss_chart(steps)] if logs else []
    for place, (name, log) in enumerate(steps.items(), start=1):
        # The first step always carries the weights; a second one says that they changed.
        if sum("mixture" in line for line in log) > 1:
            ending = f"-{place}" if len(logs) > 1 else ""
            caption = f"{name}: each domain's share of the training text (log scale)."
            charts.append(mixture_chart(f"mixture{ending}", log, caption))
    return charts


def _loss_chart(logs: Mapping[str, Log]) -> Chart:
    figure, axes = _plain_figure()
    rows = [["model", "step", "tokens", "loss", "domains taken out", "running mean"]]
    for place, (name, log) in enumerate(logs.items()):
        losses = steady_losses(log)
        means = running_mean(losses)
        tokens = [line["tokens"] / 1e3 for line in log]
        axes.plot(tokens, losses, color=f"C{place % 10}", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, means, color=f"C{place % 10}", linewidth=2, label=name)
        rows += [
            [name, *(str(line[key]) for key in ("step", "tokens", "loss")), f"{x:.5g}", f"{y:.5g}"]
            for line, x, y in zip(log, losses, means, strict=True)
        ]
    axes.set(xlabel="training tokens (thousands)", ylabel="loss (nats per token)")
    _legend_below(figure, axes)
    caption = (
        "Training loss: running mean, behind it every step. The differences between the domains "
        "are taken out, so that it does not matter which domains a step happened to draw."
    )
    return Chart("loss", figure, rows, caption)


def steady_losses(log: Log) -> list[float]:
    """Return the losses of the steps without the differences between the domains.

    A step's loss is the run's mean loss plus the mean over its domains of what the domain's loss
    lies above its own mean over the run.
    """
    by_domain: dict[str, list[float]] = {}
    for line in log:
        for domain, loss in line["domain_loss"].items():
            by_domain.setdefault(domain, []).append(loss)
    means = {domain: fmean(losses) for domain, losses in by_domain.items()}
    mean = fmean(line["loss"] for line in log)
    return [
        mean + fmean(loss - means[domain] for domain, loss in line["domain_loss"].items())
        for line in log
    ]


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of the quarter of all values that lies around each one, less at the ends."""
    reach = len(values) // 8
    return [fmean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def mixture_chart(name: str, log: Log, caption: str) -> Chart:
    """Draw the domains' weights over tokens; the rows say for each domain and change why.

    Args:
        name: Name of the chart.
        log: A run's steps. Those before which weights were set carry them as `mixture` (the fields
            of `data.mixture.WeightUpdate`). Domains that were left out are not drawn.
        caption: Caption of the chart.
    """
    figure, axes = _plain_figure()
    updates = [line["mixture"] for line in log if "mixture" in line]
    tokens_per_step = log[0]["tokens"] // log[0]["step"]
    rows = [["step", "tokens", "domain", "weight", "loss", "reference"]]
    for update in updates:
        step = update["step"]
        for domain, weight in update["weights"].items():
            # The weights that a run starts with come from no losses.
            losses = (update[key].get(domain, "") for key in ("losses", "reference"))
            cells = (step, step * tokens_per_step, domain, weight, *losses)
            rows.append([str(cell) for cell in cells])
    starts = [update["step"] * tokens_per_step / 1e3 for update in updates]
    for domain in sorted({domain for update in updates for domain in update["weights"]}):
        weights = [update["weights"][domain] for update in updates]
        if any(weights):
            # Weights hold until the next update, the last ones until the end of the run.
            ends = [*starts, log[-1]["tokens"] / 1e3], [*weights, weights[-1]]
            axes.step(*ends, where="post", label=domain)
    axes.set(xlabel="training tokens (thousands)", ylabel="weight in the mixture", yscale="log")
    # On a logarithmic scale the small weights, which move most, can be told apart.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend_below(figure, axes)
    return Chart(name, figure, rows, caption)
