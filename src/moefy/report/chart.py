"""A figure with the numbers that it shows, as files and as part of a page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from moefy.report.tables import Rows, write_csv

# Inches; at this width the letters of a figure can be read on a phone of 390 pixels.
_WIDTH = 4.6
_REFERENCES = re.compile(r'(\bid="|\bhref="#|url\(#)')


@dataclass(frozen=True)
class Chart:
    """A figure of a report."""

    name: str  # of its files, without ending
    figure: Figure
    rows: Rows  # the numbers that it shows
    caption: str  # how to read it
    is_detail: bool = False  # it explains a result rather than shows one

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


def plain_figure(height: float = 3.6) -> tuple[Figure, Axes]:
    """Return a figure of the common width with one plot."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend under the plot, in as many columns as its labels allow."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    # About 44 letters fit beside each other, 5 of them as wide as a marker and its margin.
    columns = max(1, min(len(labels), 44 // (longest + 5)))
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=columns)


def load_chart(name: str, shares: Float[np.ndarray, "layers experts"], caption: str) -> Chart:
    """Draw how often each routed expert is chosen, by layer.

    Args:
        name: Name of the chart.
        shares: Share of a layer's choices that each expert gets; every row sums to 1.
        caption: Caption of the chart, before the words that explain the colours.
    """
    load = shares * shares.shape[1]  # [layers, experts], 1 is even use
    figure, axes = plain_figure()
    # The scale is the same in all figures, so that two models can be compared by eye.
    image = axes.imshow(load, aspect="auto", vmin=0, vmax=3, cmap="viridis", origin="lower")
    axes.set(xlabel="expert", ylabel="layer")
    axes.locator_params(integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=axes, label="load (1 = even)")
    rows = [["layer", "expert", "load"]]
    rows += [[str(i), str(j), f"{load[i, j]:.5g}"] for i, j in np.ndindex(load.shape)]
    how = "1 is even use, yellow is 3 times as much or more."
    return Chart(name, figure, rows, f"{caption}; {how}", is_detail=True)
