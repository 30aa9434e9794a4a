"""A figure with the numbers that it shows, as files and as part of a page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moefy.report.tables import Rows, write_csv

_REFERENCES = re.compile(r'(\bid="|\bhref="#|url\(#)')


@dataclass(frozen=True)
class Chart:
    """A figure of a report.

    Attributes:
        name: of its files, without ending.
        figure: drawn.
        rows: header and rows of what it shows.
        caption: how to read it.
    """

    name: str
    figure: Figure
    rows: Rows
    caption: str

    def write(self, folder: Path) -> None:
        """Write NAME.png and NAME.csv."""
        self.write_picture(folder)
        write_csv(folder / f"{self.name}.csv", self.rows)

    def write_picture(self, folder: Path) -> None:
        """Write NAME.png alone."""
        self.figure.savefig(folder / f"{self.name}.png", dpi=150)

    def svg(self) -> str:
        """Return an SVG element whose ids are no other figure's, so that a page can hold several.

        The same figure gives the same bytes.
        """
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with mpl.rc_context({"svg.hashsalt": "moefy"}):
            self.figure.savefig(text, format="svg", metadata=nothing)
        element = text.getvalue()[text.getvalue().index("<svg") :]
        return _REFERENCES.sub(rf"\g<1>{self.name}-", element)


def load_rows(shares: Float[np.ndarray, "layers experts"]) -> Rows:
    """Return what `figures.load_heatmap` shows: a row for each expert, 1 is even use.

    Args:
        shares: each layer's sum to 1.
    """
    return [["layer", "expert", "load"], *matrix_rows(shares * shares.shape[1])]


def matrix_rows(matrix: Float[np.ndarray, "rows columns"]) -> Rows:
    """Return a row for each entry of a matrix: its two indices and its value."""
    return [[str(i), str(j), f"{matrix[i, j]:.5g}"] for i, j in np.ndindex(matrix.shape)]
