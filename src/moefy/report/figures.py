"""Figures of a training run, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

if TYPE_CHECKING:
    from moefy.studies.scores import Score


def loss_curve(log: list[dict[str, Any]], *, dense_losses: Mapping[str, float]) -> Figure:
    """Draw the training loss over tokens, one line per domain: they differ by more than they learn.

    Args:
        log: a run's steps (see `training.state.read_log`).
        dense_losses: held-out losses of the dense model by domain, nats per token, as dashed lines.
    """
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axes = figure.subplots()
    domains = sorted({domain for line in log for domain in line["domain_loss"]})
    for place, domain in enumerate(domains):
        steps = [line for line in log if domain in line["domain_loss"]]
        tokens = [line["tokens"] / 1e3 for line in steps]
        losses = [line["domain_loss"][domain] for line in steps]
        color = f"C{place % 10}"
        axes.plot(tokens, losses, color=color, marker="o", markersize=3, label=domain)
        if domain in dense_losses:
            axes.axhline(dense_losses[domain], color=color, linestyle="--", linewidth=1)
    if dense_losses:
        axes.plot([], [], color="0.4", linestyle="--", linewidth=1, label="dense model, held out")
    axes.set(xlabel="training tokens (thousands)", ylabel="loss (nats per token)")
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def expert_load(log: list[dict[str, Any]]) -> Float[np.ndarray, "layers experts"]:
    """Return how often each expert was chosen in the run's last quarter, rows that sum to 1."""
    last = log[-max(1, len(log) // 4) :]
    return np.mean([line["expert_load"] for line in last], axis=0)


def expert_load_heatmap(log: list[dict[str, Any]]) -> Figure:
    """Draw `expert_load` of a run."""
    return load_heatmap(expert_load(log))


def load_heatmap(shares: np.ndarray[Any, Any]) -> Figure:
    """Draw how often each expert is chosen, per layer; the scale is fixed from 0 to 3, 1 is even.

    Args:
        shares: [layers, experts], each row sums to 1.
    """
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        shares * shares.shape[1], aspect="auto", vmin=0, vmax=3, cmap="viridis", origin="lower"
    )
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes, label="load (1 = even)")
    return figure


def mixture_weights(log: list[dict[str, Any]]) -> Figure:
    """Draw the domains' weights over tokens, on a logarithmic scale: the small ones move most.

    Args:
        log: a run's steps; those before which weights were set carry them as `mixture` (the fields
            of `data.mixture.WeightUpdate`). Domains that were left out are not drawn.
    """
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axes = figure.subplots()
    updates = [line["mixture"] for line in log if "mixture" in line]
    tokens_per_step = log[0]["tokens"] / log[0]["step"]
    starts = [update["step"] * tokens_per_step / 1e3 for update in updates]
    for domain in sorted({domain for update in updates for domain in update["weights"]}):
        weights = [update["weights"][domain] for update in updates]
        if any(weights):
            axes.step(
                [*starts, log[-1]["tokens"] / 1e3],
                [*weights, weights[-1]],
                where="post",
                label=domain,
            )
    axes.set(xlabel="training tokens (thousands)", ylabel="weight in the mixture")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def leaderboard_figure(scores: Sequence[Score]) -> Figure:
    """Draw nats above dense over the active share of the FFN, one line per method.

    The legend's order is that at the smallest share; rows in which everything runs are left out.
    """
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for score in scores:
        if score.active < score.experts:
            point = score.active / score.experts, score.nats_above_dense
            lines.setdefault(score.method, []).append(point)
    for place, name in enumerate(sorted(lines, key=lambda name: -min(lines[name])[1])):
        share, nats = zip(*sorted(lines[name]), strict=True)
        style, marker = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "v"))[place // 10 % 4]
        axes.plot(share, nats, style, marker=marker, markersize=4, label=name)
    axes.set(xlabel="share of the FFN that runs per token", ylabel="nats above dense")
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.3, 1, 3, 10], labels=["0.1", "0.3", "1", "3", "10"])
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
