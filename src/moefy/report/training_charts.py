"""The training of one model or several, as figures with their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from moefy.report.chart import Chart, load_rows
from moefy.report.figures import expert_load, expert_load_heatmap, loss_curve, mixture_weights
from moefy.report.tables import Rows, mixture_rows

Logs = Mapping[str, list[dict[str, Any]]]


def training_charts(logs: Logs, dense_losses: Mapping[str, float]) -> list[Chart]:
    """Draw all losses in one figure; then, of each run, the mixture if it changed, expert load.

    Args:
        logs: steps by model (see `training.state.read_log`).
        dense_losses: as for `figures.loss_curve`, possibly empty.
    """
    if not logs:
        return []
    charts = [_loss_chart(logs, dense_losses)]
    for place, (name, log) in enumerate(logs.items(), start=1):
        ending, whose = (f"-{place}", f"{name}. ") if len(logs) > 1 else ("", "")
        if sum("mixture" in line for line in log) > 1:
            charts.append(
                Chart(
                    f"mixture{ending}",
                    mixture_weights(log),
                    mixture_rows(log),
                    f"{whose}Each domain's weight in the mixture, from one update to the next "
                    "(log scale).",
                )
            )
        if "expert_load" in log[-1]:
            charts.append(
                Chart(
                    f"expert-load{ending}",
                    expert_load_heatmap(log),
                    load_rows(expert_load(log)),
                    f"{whose}How often each routed expert was chosen in the last quarter of the "
                    "run; 1 is even use, 3 and more are yellow. Shared experts always run and are "
                    "not shown.",
                )
            )
    return charts


def _loss_chart(logs: Logs, dense_losses: Mapping[str, float]) -> Chart:
    rows: Rows = [["model", "step", "tokens", "domain", "loss"]]
    for name, log in logs.items():
        for line in log:
            for domain, loss in line["domain_loss"].items():
                rows.append([name, str(line["step"]), str(line["tokens"]), domain, str(loss)])
    rows += [["dense, held out", "", "", domain, str(v)] for domain, v in dense_losses.items()]
    if len(logs) == 1:
        (log,) = logs.values()
        figure = loss_curve(log, dense_losses=dense_losses)
    else:
        figure = _loss_panels(logs, dense_losses)
    caption = "Training loss on each domain's text, next token, nats."
    if dense_losses:
        caption += " Dashed: the dense model on held-out text."
    return Chart("loss", figure, rows, caption)


def _loss_panels(logs: Logs, dense_losses: Mapping[str, float]) -> Figure:
    """Draw a panel for each domain, a line for each model."""
    domains = sorted(
        {name for log in logs.values() for line in log for name in line["domain_loss"]}
    )
    height = -(-len(domains) // 2)
    figure = Figure(figsize=(5.2, 0.8 + 1.8 * height), layout="constrained")
    panels = figure.subplots(height, 2 if len(domains) > 1 else 1, sharex=True, squeeze=False)
    for axes, domain in zip(panels.flat, domains, strict=False):
        for place, (name, log) in enumerate(logs.items()):
            steps = [line for line in log if domain in line["domain_loss"]]
            axes.plot(
                [line["tokens"] / 1e3 for line in steps],
                [line["domain_loss"][domain] for line in steps],
                color=f"C{place % 10}",
                marker="o",
                markersize=3,
                label=name,
            )
        if domain in dense_losses:
            axes.axhline(dense_losses[domain], color="0.4", linestyle="--", linewidth=1)
        axes.set_title(domain, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(domains) :]:
        axes.set_axis_off()
    figure.supxlabel("training tokens (thousands)", fontsize="medium")
    figure.supylabel("loss (nats per token)", fontsize="medium")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=3)
    return figure
