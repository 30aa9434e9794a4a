"""Loss over measured speed: the figure, and where a split or pruning wins at equal speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_STYLES = {False: ("split", "o", "#0868ac"), True: ("pruned", "s", "#c2410c")}
# Where a label may stand around its point: as near as possible, on the right first.
_DIRECTIONS = ((1, 0), (-1, 0), (0.7, 1), (-0.7, 1), (0.7, -1), (-0.7, -1), (0, 1), (0, -1))
_PLACES = tuple((x * far, y * far) for far in (8, 14, 22, 32) for x, y in _DIRECTIONS)


@dataclass(frozen=True)
class Design:
    """A way to make a model smaller, and what it was measured to be."""

    name: str
    pruned: bool  # a smaller dense model; otherwise a split
    nats: float  # held-out loss above the dense model's
    # factors over the dense model by what was measured: "decode speed", say, the larger the better
    gains: Mapping[str, float]

    def gain(self, measure: str) -> float:
        """Return the factor over the dense model, 1 for the dense model itself."""
        return self.gains.get(measure, 1.0)


DENSE = Design("dense", pruned=True, nats=0.0, gains={})
SIZE = "active parameters"
"""A measure that is better the smaller it is: its gain is the dense model's over it."""


def pruned_loss(designs: Sequence[Design], measure: str, gain: float) -> float | None:
    """Return the loss above dense at which pruning reaches a gain, between its measured points.

    The dense model is the pruned model that keeps everything. A pruned model that gains no more
    than one of a lower loss is passed over. None where the gain is beyond them all.
    """
    gains, losses = [1.0], [0.0]
    for each in sorted(designs, key=lambda each: each.nats):
        if each.pruned and each.gain(measure) > gains[-1]:
            gains.append(each.gain(measure))
            losses.append(each.nats)
    return float(np.interp(gain, gains, losses)) if gain <= gains[-1] else None


def at_equal(designs: Sequence[Design], measure: str) -> str:
    """Say by how many nats each split beats pruning at its own gain, or pruning beats it."""
    wins: dict[str, list[str]] = {"the split": [], "pruning": []}
    beyond = []
    for each in (each for each in designs if not each.pruned):
        rival = pruned_loss(designs, measure, each.gain(measure))
        if rival is None:
            beyond.append(each.name)
        else:
            winner = "the split" if each.nats < rival else "pruning"
            wins[winner].append(f"{each.name} (by {abs(rival - each.nats):.2f} nats)")
    found = [
        f"{who} has the lower loss for {', '.join(all_)}" for who, all_ in wins.items() if all_
    ]
    says = [f"At equal {measure}, {'; '.join(found)}."] if found else []
    more = "small" if measure == SIZE else "fast"
    says += [f"No pruned model was as {more} as {', '.join(beyond)}."] if beyond else []
    return " ".join(says)


def frontier_figure(designs: Sequence[Design], title: str) -> Figure:
    """Draw loss over every gain that was measured, each with its frontier."""
    measures = list(designs[0].gains)
    rows = -(-len(measures) // 2)
    figure = Figure(figsize=(8.6, 4.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, 2, sharey=True).flat)
    for axes in panels[len(measures) :]:
        axes.remove()
    panels = panels[: len(measures)]
    for axes, measure in zip(panels, measures, strict=True):
        _draw(axes, designs, measure)
    for axes in panels[::2]:
        axes.set(ylabel="nats above the dense model")
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle(title, fontsize=10)
    figure.draw_without_rendering()  # labels need to know where points are
    for axes, measure in zip(panels, measures, strict=True):
        _label(axes, [DENSE, *designs], measure)
    return figure


def _draw(axes: Axes, designs: Sequence[Design], measure: str) -> None:
    """Draw points, the line between the pruned models, and the frontier."""
    largest = max(each.gain(measure) for each in [DENSE, *designs])
    gains = np.linspace(1.0, largest, 500)
    lowest = [_lowest_loss(designs, measure, gain) for gain in gains]
    axes.plot(gains, lowest, color="0.85", linewidth=7, label="frontier", zorder=1)
    pruned_losses = [pruned_loss(designs, measure, gain) for gain in gains]
    axes.plot(gains, np.array(pruned_losses, float), color=_STYLES[True][2], ls=":", zorder=2)
    for pruned, (label, marker, color) in _STYLES.items():
        of_kind = [each for each in designs if each.pruned == pruned]
        at = [each.gain(measure) for each in of_kind]
        axes.scatter(
            at, [each.nats for each in of_kind], marker=marker, color=color, label=label, zorder=3
        )
    axes.scatter(1.0, 0.0, marker="D", color="black", zorder=3)
    dense = f"dense model / {measure}" if measure == SIZE else f"{measure} / dense model"
    axes.set(xlabel=dense)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.14, y=0.1)


def _lowest_loss(designs: Sequence[Design], measure: str, gain: float) -> float:
    """Return the lowest loss of what gains as much or more; pruning between its measured points."""
    found = [each.nats for each in designs if each.gain(measure) >= gain]
    between = pruned_loss(designs, measure, gain)
    return min(found if between is None else [*found, between])


def _label(axes: Axes, designs: Sequence[Design], measure: str) -> None:
    """Write each point's name where it covers no point, line or other name."""
    points = axes.transData.transform([(each.gain(measure), each.nats) for each in designs])
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    taken += [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in np.concatenate(lines)]
    for each in designs:
        color = "black" if each is DENSE else _STYLES[each.pruned][2]
        for x, y in _PLACES:
            text = axes.annotate(
                each.name.replace(" of ", "/"),
                (each.gain(measure), each.nats),
                (x, y),
                textcoords="offset points",
                fontsize=8,
                color=color,
                ha=("center", "left", "right")[int(np.sign(x))],
                va=("center", "bottom", "top")[int(np.sign(y))],
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkB": 4},
            )
            text.set_in_layout(False)
            text.get_window_extent()  # moves it to its place
            box = Text.get_window_extent(text)  # without the line to its point
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        taken.append(box)
