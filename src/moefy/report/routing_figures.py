"""What routers do, as figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moefy.report.figures import load_heatmap

if TYPE_CHECKING:
    from moefy.evaluation.routing import RoutingResult, RoutingStats


def expert_load(model: RoutingStats, tokens: Mapping[str, int]) -> Figure:
    """Draw how often each expert is chosen, per layer, over all tokens.

    Args:
        model: whose load to draw.
        tokens: by domain.
    """
    figure = load_heatmap(overall_load(model, tokens))
    figure.axes[0].set_title(model.name, fontsize="medium")
    return figure


def overall_load(
    model: RoutingStats, tokens: Mapping[str, int]
) -> Float[np.ndarray, "layers experts"]:
    """Return each expert's share of its layer's choices over all tokens.

    Args:
        model: whose load to add up.
        tokens: by domain.
    """
    loads = np.array([model.load[domain] for domain in tokens])
    return np.average(loads, axis=0, weights=list(tokens.values()))


def domain_loads(model: RoutingStats, _: Mapping[str, int]) -> Figure:
    """Draw how each domain uses the experts of the first, a middle and the last layer.

    Rows that look alike say that the routers do not tell the domains apart.
    """
    layers = shown_layers(model)
    loads = np.array(list(model.load.values())).swapaxes(0, 1) * model.experts
    height = 1.2 + len(layers) * (0.5 + 0.25 * len(model.load))
    figure = Figure(figsize=(5.2, height), layout="constrained")
    grid = figure.subplots(len(layers), sharex=True, squeeze=False)[:, 0]
    for axes, layer_idx in zip(grid, layers, strict=True):
        image = axes.imshow(loads[layer_idx], aspect="auto", vmin=0, vmax=3, cmap="viridis")
        axes.set_title(f"layer {layer_idx}", fontsize="small")
        axes.set_yticks(range(len(model.load)), labels=list(model.load))
    _whole_numbers(grid[-1].xaxis)
    grid[-1].set_xlabel("expert")
    figure.suptitle(model.name, fontsize="medium")
    figure.colorbar(image, ax=list(grid), label="load (1 = even)")
    return figure


def coactivation_maps(model: RoutingStats, _: Mapping[str, int]) -> Figure:
    """Draw which experts are chosen together, in the first, a middle and the last layer.

    The diagonal, where every share is 1, is left out.
    """
    layers = shown_layers(model)
    figure = Figure(figsize=(1.2 + 2.6 * len(layers), 3.2), layout="constrained")
    grid = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, layer_idx in zip(grid, layers, strict=True):
        shares = np.array(model.coactivation[layer_idx])
        np.fill_diagonal(shares, np.nan)
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", origin="lower")
        axes.set_title(f"layer {layer_idx}", fontsize="small")
        axes.set_xlabel("expert f")
        _whole_numbers(axes.xaxis)
        _whole_numbers(axes.yaxis)
    grid[0].set_ylabel("expert e")
    figure.suptitle(model.name, fontsize="medium")
    figure.colorbar(image, ax=list(grid), label="share of e's tokens")
    return figure


def quality_curve(result: RoutingResult) -> Figure:
    """Draw the loss over the number of chosen experts, one line per model; a ring is the saved k.

    The dense model's loss is a dashed line.
    """
    figure = Figure(figsize=(5.2, 3.6 + 0.2 * len(result.models)), layout="constrained")
    axes = figure.subplots()
    for place, model in enumerate(result.models):
        color = f"C{place % 10}"
        ks = [at.k for at in model.quality]
        losses = [at.loss for at in model.quality]
        axes.plot(ks, losses, color=color, marker="o", markersize=4, label=model.name)
        saved = ks.index(model.active)
        axes.plot(ks[saved], losses[saved], "o", color=color, markersize=9, fillstyle="none")
    axes.plot([], [], "o", color="0.4", markersize=9, fillstyle="none", label="as saved")
    if result.reference_loss is not None:
        label = f"{result.reference} (dense)"
        axes.axhline(result.reference_loss, color="0.4", linestyle="--", linewidth=1, label=label)
    ticks = _apart({at.k for model in result.models for at in model.quality})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[str(k) for k in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="routed experts chosen per token", ylabel="loss (nats per token)")
    figure.legend(frameon=False, loc="outside upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def shown_layers(model: RoutingStats) -> list[int]:
    """Return the first, a middle and the last layer."""
    last = len(model.entropy) - 1
    return sorted({0, last // 2, last})


def _apart(ks: set[int]) -> list[int]:
    """Return those that have room for a label on a logarithmic axis."""
    kept: list[int] = []
    for k in sorted(ks):
        if not kept or k >= 1.2 * kept[-1]:
            kept.append(k)
    return kept


def _whole_numbers(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
