"""Figures of a study, drawn without a display."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from moefy.studies.grid import GridPoint
from moefy.studies.runs import Run
from moefy.studies.summary import spread


def ablation_figure(arms: Mapping[str, Sequence[Run]]) -> Figure:
    """Draw held-out loss along training, a line per arm; arms that are not trained are level.

    Without curves, the losses before and after are drawn, with 95% intervals over the seeds.
    """
    curved = any(run.curve for runs in arms.values() for run in runs)
    height = 4.0 if curved else max(2.5, 0.3 * len(arms))
    figure = Figure(figsize=(7.6, height), layout="constrained")
    axes = figure.subplots()
    if curved:
        for name, runs in arms.items():
            if not runs[0].curve:
                loss = statistics.fmean(run.loss for run in runs)
                axes.axhline(loss, color="0.4", linestyle="--", linewidth=1, label=name)
                continue
            tokens = [tokens / 1e3 for tokens, _ in runs[0].curve]
            losses = list(zip(*([loss for _, loss in run.curve] for run in runs), strict=True))
            (line,) = axes.plot(tokens, list(map(statistics.fmean, losses)), "o-", ms=3, label=name)
            # the range of the seeds; an interval of three seeds would hide the other lines
            low, high = list(map(min, losses)), list(map(max, losses))
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="training tokens (thousands)", ylabel="held-out loss (nats per token)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        for when, color in (("loss_before", "0.6"), ("loss", "C0")):
            found = [spread([getattr(run, when) for run in runs]) for runs in arms.values()]
            widths = [each.half_width or 0.0 for each in found]
            means = [each.mean for each in found]
            label = "before" if when == "loss_before" else "after"
            axes.errorbar(means, range(len(arms)), xerr=widths, fmt="o", color=color, label=label)
        axes.set_yticks(range(len(arms)), labels=list(arms))
        axes.invert_yaxis()
        axes.set(xlabel="held-out loss (nats per token)")
        if any(run.conversations for runs in arms.values() for run in runs):
            axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def grid_figure(points: Sequence[GridPoint]) -> Figure:
    """Draw loss above dense over active parameters and over both speeds.

    A colour per number of experts, static pruning in grey; bars are 95% intervals over seeds.
    """
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    groups: dict[str, list[GridPoint]] = {}
    for point in sorted(points, key=lambda point: point.active_of_dense):
        name = "pruned" if point.shared == point.active else f"{point.experts} slices"
        groups.setdefault(name, []).append(point)
    for axes, measure in zip(panels, ("active", "prefill", "decode"), strict=True):
        for name, found in groups.items():
            axes.errorbar(
                [getattr(point, f"{measure}_of_dense") for point in found],
                [point.nats_above_dense for point in found],
                yerr=[point.half_width or 0.0 for point in found],
                fmt="s" if name == "pruned" else "o",
                color="0.2" if name == "pruned" else None,
                # speed is no function of the size, so its points are not joined
                linestyle="-" if measure == "active" else "none",
                markersize=4,
                label=name,
            )
        label = "active parameters" if measure == "active" else f"{measure} speed"
        axes.set(xlabel=f"{label} / dense model")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="nats above dense")
    panels[0].legend(frameon=False)
    return figure
