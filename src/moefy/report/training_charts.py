"""The training of one model or several, as figures with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from moefy.report.chart import Chart, legend_below, load_chart, plain_figure
from moefy.storage import storage_errors
from moefy.training.state import read_log

Log = list[dict[str, Any]]
"""The steps of a run, as `training.state.read_log` returns them."""


def draw_training(folder: Path) -> None:
    """Draw the training that lies in a folder of `train`, as PNG files there.

    Raises:
        StorageError: The files cannot be written.
    """
    for chart in training_charts({folder.name: read_log(folder)}):
        with storage_errors(folder):
            chart.figure.savefig(folder / f"{chart.name}.png", dpi=150)


def training_charts(logs: Mapping[str, Log]) -> list[Chart]:
    """Draw the loss of all runs in one figure; then, of each, the mixture if it changed, and load.

    Args:
        logs: The steps of each run, by model.
    """
    # The first and the last line of `tune` hold a held-out loss and are no steps.
    steps = {name: [line for line in log if "loss" in line] for name, log in logs.items()}
    charts = [_loss_chart(steps)] if logs else []
    for place, (name, log) in enumerate(steps.items(), start=1):
        ending = f"-{place}" if len(logs) > 1 else ""
        # The first step always carries the weights; a second one says that they changed.
        if sum("mixture" in line for line in log) > 1:
            caption = f"{name}: each domain's share of the training text (log scale)."
            charts.append(mixture_chart(f"mixture{ending}", log, caption))
        if "expert_load" in log[-1]:
            # A single step's load is mostly which text it saw.
            last = log[-max(1, len(log) // 4) :]
            load = np.mean([line["expert_load"] for line in last], axis=0)
            caption = f"{name}: choices of each routed expert in the last quarter of the run"
            charts.append(load_chart(f"expert-load{ending}", load, caption))
    return charts


def _loss_chart(logs: Mapping[str, Log]) -> Chart:
    figure, axes = plain_figure()
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
    legend_below(figure, axes)
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
    figure, axes = plain_figure()
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
    legend_below(figure, axes)
    return Chart(name, figure, rows, caption)
