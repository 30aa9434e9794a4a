"""The training of one model or several, as figures with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from moefy.report.chart import WIDTH, Chart, legend_below, load_chart, plain_figure
from moefy.report.tables import Rows
from moefy.storage import storage_errors
from moefy.training.follow import kept_reference
from moefy.training.state import read_log

Log = list[dict[str, Any]]
"""The steps of a run, as `training.state.read_log` returns them."""


def draw_training(folder: Path) -> None:
    """Draw the training that lies in a folder of `train`, as PNG files there.

    Raises:
        StorageError: The files cannot be written.
    """
    for chart in training_charts({folder.name: read_log(folder)}, kept_reference(folder)):
        with storage_errors(folder):
            chart.figure.savefig(folder / f"{chart.name}.png", dpi=150)


def training_charts(logs: Mapping[str, Log], dense_losses: Mapping[str, float]) -> list[Chart]:
    """Draw all losses in one figure; then, of each run, the mixture if it changed, expert load.

    Args:
        logs: The steps of each run, by model.
        dense_losses: Held-out losses of the dense model by domain, nats per token; may be empty.
    """
    charts = [_loss_chart(logs, dense_losses)] if logs else []
    for place, (name, log) in enumerate(logs.items(), start=1):
        ending = f"-{place}" if len(logs) > 1 else ""
        if sum("mixture" in line for line in log) > 1:
            caption = f"{name}: each domain's share of the training text (log scale)."
            figure, rows = mixture_weights(log), mixture_rows(log)
            charts.append(Chart(f"mixture{ending}", figure, rows, caption))
        if "expert_load" in log[-1]:
            last = log[-max(1, len(log) // 4) :]
            load = np.mean([line["expert_load"] for line in last], axis=0)
            caption = f"{name}: choices of each routed expert in the last quarter of the run"
            charts.append(load_chart(f"expert-load{ending}", load, caption))
    return charts


def _loss_chart(logs: Mapping[str, Log], dense_losses: Mapping[str, float]) -> Chart:
    """Draw a panel for each domain, since domains differ by more than they learn."""
    lines = [line for log in logs.values() for line in log]
    domains = sorted({domain for line in lines for domain in line["domain_loss"]})
    height = -(-len(domains) // 2)
    figure = Figure(figsize=(WIDTH, 1 + 1.5 * height), layout="constrained")
    panels = figure.subplots(height, min(2, len(domains)), sharex=True, squeeze=False)
    rows = [["model", "step", "tokens", "domain", "loss", "running mean"]]
    for place, (name, log) in enumerate(logs.items()):
        for axes, domain in zip(panels.flat, domains, strict=False):
            steps = [line for line in log if domain in line["domain_loss"]]
            tokens = [line["tokens"] / 1e3 for line in steps]
            losses = [line["domain_loss"][domain] for line in steps]
            means = running_mean(losses)
            # One step holds a few windows of a domain: its loss is mostly which windows they are.
            axes.plot(tokens, losses, color=f"C{place % 10}", alpha=0.25, linewidth=0.8)
            axes.plot(tokens, means, color=f"C{place % 10}", linewidth=1.8, label=name)
            rows += [
                [name, str(line["step"]), str(line["tokens"]), domain, str(loss), f"{mean:.5g}"]
                for line, loss, mean in zip(steps, losses, means, strict=True)
            ]
    for axes, domain in zip(panels.flat, domains, strict=False):
        if domain in dense_losses:
            loss = dense_losses[domain]
            axes.axhline(loss, color="0.4", ls="--", lw=1, label="dense model, held out")
            rows.append(["dense, held out", "", "", domain, str(loss), ""])
        axes.set_title(domain, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(domains) :]:
        axes.set_axis_off()
    figure.supxlabel("training tokens (thousands)", fontsize="medium")
    figure.supylabel("loss (nats per token)", fontsize="medium")
    legend_below(figure, panels.flat[0])
    caption = "Training loss on each domain's text: running mean, behind it every step."
    return Chart("loss", figure, rows, caption)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of an eighth of the values around each one; at the ends, of fewer."""
    reach = len(values) // 16
    return [
        float(np.mean(values[max(0, place - reach) : place + reach + 1]))
        for place in range(len(values))
    ]


def mixture_weights(log: Log) -> Figure:
    """Draw the domains' weights over tokens, on a logarithmic scale: the small ones move most.

    Args:
        log: A run's steps. Those before which weights were set carry them as `mixture` (the fields
            of `data.mixture.WeightUpdate`). Domains that were left out are not drawn.
    """
    figure, axes = plain_figure()
    updates = [line["mixture"] for line in log if "mixture" in line]
    tokens_per_step = log[0]["tokens"] / log[0]["step"]
    starts = [update["step"] * tokens_per_step / 1e3 for update in updates]
    for domain in sorted({domain for update in updates for domain in update["weights"]}):
        weights = [update["weights"][domain] for update in updates]
        if any(weights):
            # Weights hold until the next update, the last ones until the end of the run.
            ends = [*starts, log[-1]["tokens"] / 1e3], [*weights, weights[-1]]
            axes.step(*ends, where="post", label=domain)
    axes.set(xlabel="training tokens (thousands)", ylabel="weight in the mixture", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    legend_below(figure, axes)
    return figure


def mixture_rows(log: Log) -> Rows:
    """Return header and rows of a mixture's history: one row for each domain and change.

    The losses of the weights that a run starts with are empty.
    """
    rows = [["step", "tokens", "domain", "weight", "loss", "reference"]]
    tokens_per_step = log[0]["tokens"] // log[0]["step"]
    for update in (line["mixture"] for line in log if "mixture" in line):
        step = update["step"]
        for domain, weight in update["weights"].items():
            losses = (update[key].get(domain, "") for key in ("losses", "reference"))
            cells = (step, step * tokens_per_step, domain, weight, *losses)
            rows.append([str(cell) for cell in cells])
    return rows
