"""Figures of a study's ablations, without a display."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from moefy.studies.grid import GridPoint
    from moefy.studies.outcome import ArmOutcome
    from moefy.studies.scores import Score

Curve = Sequence[tuple[int, float]]


def ablation_figure(
    arms: Mapping[str, ArmOutcome], curves: Mapping[str, Mapping[int, Curve]]
) -> Figure:
    """Draw held-out loss along training, one line per arm with the range of its seeds.

    Without curves, the losses before and after are drawn instead, a dot per seed.

    Args:
        arms: by name.
        curves: tokens and loss, by arm and seed.
    """
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axes = figure.subplots()
    if curves:
        for name, by_seed in curves.items():
            tokens = [point[0] / 1e3 for point in next(iter(by_seed.values()))]
            losses = list(zip(*([p[1] for p in curve] for curve in by_seed.values()), strict=True))
            means = [statistics.fmean(values) for values in losses]
            (line,) = axes.plot(tokens, means, marker="o", markersize=3, label=name)
            low, high = [min(v) for v in losses], [max(v) for v in losses]
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        for name, arm in arms.items():
            if not arm.learned:
                loss = statistics.fmean(arm.after.values())
                axes.axhline(loss, color="0.4", linestyle="--", linewidth=1, label=name)
        axes.set(xlabel="training tokens (thousands)", ylabel="held-out loss (nats per token)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        for place, arm in enumerate(arms.values()):
            before, after = list(arm.before.values()), list(arm.after.values())
            axes.plot(before, [place] * len(before), "o", color="0.6")
            axes.plot(after, [place] * len(after), "o", color="C0")
        axes.plot([], [], "o", color="0.6", label="before")
        axes.plot([], [], "o", color="C0", label="after")
        axes.set_yticks(range(len(arms)), labels=list(arms))
        axes.invert_yaxis()
        axes.set(xlabel="held-out loss (nats per token)")
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def pareto_figure(points: Sequence[GridPoint]) -> Figure:
    """Draw loss above dense over active parameters, and over measured speed.

    A colour per number of experts, static pruning in grey; bars are 95 % intervals over seeds.
    """
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    x_values = (
        ("active_of_dense", "active parameters, of the dense model's"),
        ("prefill_of_dense", "prefill speed, of the dense model's"),
        ("decode_of_dense", "decode speed, of the dense model's"),
    )
    groups: dict[str, list[GridPoint]] = {}
    for point in points:
        pruned = point.shared == point.active
        name = "pruned (dense)" if pruned else f"{point.experts} slices"
        groups.setdefault(name, []).append(point)
    for axes, (key, label) in zip(panels, x_values, strict=True):
        for name, found in groups.items():
            line = sorted(found, key=lambda p: p.active_of_dense)
            pruned = "pruned" in name
            style = ("--" if pruned else "-") if key == "active_of_dense" else "none"
            axes.errorbar(
                [getattr(point, key) for point in line],
                [point.nats_above_dense for point in line],
                yerr=[point.half_width or 0.0 for point in line],
                marker="s" if pruned else "o",
                color="0.2" if pruned else None,
                linestyle=style,
                markersize=4,
                label=name,
            )
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="nats above dense")
    panels[0].legend(frameon=False)
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
