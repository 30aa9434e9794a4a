"""A grid: what splits of a study's model were measured to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moefy.errors import UsageError
from moefy.report.frontier import SIZE, Design
from moefy.report.tables import Columns, Rows, read_rows, table, with_error

GRID = "grid.csv"


@dataclass(frozen=True)
class GridPoint:
    """What one split was measured to be."""

    experts: int
    active: int
    shared: int
    seeds: int  # how many
    trained: int  # tokens, before the measurement
    nats_above_dense: float  # held-out loss minus the dense model's, mean over the seeds
    half_width: float | None  # of its 95% interval over the seeds; None for one seed
    prefill_of_dense: float  # tokens per second over the dense model's
    decode_of_dense: float
    active_of_dense: float  # active parameters over the dense model's parameters
    dense_params: int  # of the model that was split
    model: str
    data: str
    machine: str  # that speed was measured on

    @property
    def name(self) -> str:
        """Name of the arm of the ablation of size."""
        pruned = "pruned " if self.shared == self.active else ""
        return f"{pruned}{self.active}/{self.experts}"


def read_grid(file: Path) -> list[GridPoint]:
    """Read a grid's file.

    Raises:
        UsageError: a line is no point of a grid.
    """
    try:
        return read_rows(file.read_text(), GridPoint)
    except ValidationError as error:
        raise UsageError(f"{file} is no grid of this version of moefy: {error}") from error


def designs_of(points: list[GridPoint]) -> list[Design]:
    """Return the grid as what a figure of loss over speed shows."""
    return [
        Design(
            point.name,
            pruned=point.shared == point.active,
            nats=point.nats_above_dense,
            gains={
                "decode speed": point.decode_of_dense,
                "prefill speed": point.prefill_of_dense,
                SIZE: 1 / point.active_of_dense,
            },
        )
        for point in points
    ]


def grid_rows(points: list[GridPoint]) -> Rows:
    """Return header and rows of the grid: loss and speed against the dense model."""
    columns: Columns[GridPoint] = [
        ("split", lambda point: point.name),
        ("shared", lambda point: str(point.shared)),
        ("active", lambda point: f"{point.active_of_dense:.0%}"),
        ("nats above dense", lambda point: with_error(point.nats_above_dense, point.half_width)),
        ("prefill", lambda point: f"× {point.prefill_of_dense:.2f}"),
        ("decode", lambda point: f"× {point.decode_of_dense:.2f}"),
    ]
    return table(points, columns)
