"""What routers do, as figures with their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moefy.report.chart import Chart, legend_below, load_chart, plain_figure
from moefy.report.routing_tables import k_rows

if TYPE_CHECKING:
    from moefy.evaluation.routing import RoutingResult


def routing_charts(result: RoutingResult) -> list[Chart]:
    """Draw the loss by number of chosen experts, then the load of each model's experts.

    The charts are `routing-k` and `routing-load`; with several models, `routing-load-1` and so on
    in their order.
    """
    charts = [_quality_by_k(result)]
    for place, model in enumerate(result.models, start=1):
        loads = np.array([model.load[domain] for domain in result.tokens])  # [domains, layers, E]
        # Domains have different numbers of tokens: the mean over them is not that over tokens.
        overall = np.average(loads, axis=0, weights=list(result.tokens.values()))
        ending = f"-{place}" if len(result.models) > 1 else ""
        caption = f"{model.name}: how often each routed expert is chosen on held-out text"
        charts.append(load_chart(f"routing-load{ending}", overall, caption))
    return charts


def _quality_by_k(result: RoutingResult) -> Chart:
    """Draw one line per model; a ring is the saved number, the dense model a dashed line."""
    figure, axes = plain_figure()
    for place, model in enumerate(result.models):
        color = f"C{place % 10}"
        losses = {at.k: at.loss for at in model.quality}
        axes.plot(list(losses), list(losses.values()), "o-", color=color, ms=4, label=model.name)
        axes.plot(model.active, losses[model.active], "o", color=color, ms=9, fillstyle="none")
    # The legend explains the ring once, in grey, instead of once for each model.
    axes.plot([], [], "o", color="0.4", ms=9, fillstyle="none", label="as saved")
    if result.reference_loss is not None:
        label = f"{result.reference} (dense)"
        axes.axhline(result.reference_loss, color="0.4", linestyle="--", linewidth=1, label=label)
    ticks: list[int] = []
    for k in sorted({at.k for model in result.models for at in model.quality}):
        # Labels that are nearer than this on a logarithmic axis would overlap.
        if not ticks or k >= 1.2 * ticks[-1]:
            ticks.append(k)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[str(k) for k in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="routed experts chosen per token", ylabel="loss (nats per token)")
    legend_below(figure, axes)
    caption = (
        "Loss with another number of experts chosen per token than the model was saved with. A "
        "ring marks the saved number, the dashed line is the dense model."
    )
    return Chart("routing-k", figure, k_rows(result), caption)
