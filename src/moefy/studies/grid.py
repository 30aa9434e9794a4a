"""The grid of splits: what each costs in loss, and how fast it runs beside the dense model."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moefy.errors import UsageError
from moefy.studies.outcome import ArmOutcome, difference

GRID, SPEED = "grid.csv", "speed.json"


@dataclass(frozen=True, order=True)
class Split:
    """Slices of every FFN; where all active ones are shared, a smaller dense model."""

    experts: int
    active: int
    shared: int

    @property
    def name(self) -> str:
        """As arms of the ablation of size are called."""
        return ("pruned " if self.shared == self.active else "") + f"{self.active}/{self.experts}"


def split_named(name: str) -> Split | None:
    """Return the split that an arm's name means (see `ablations`), or None."""
    found = re.fullmatch(r"(pruned )?(\d+)/(\d+)", name)
    if not found:
        return None
    active, experts = int(found[2]), int(found[3])
    return Split(experts, active, active if found[1] else active // 2)


@dataclass(frozen=True)
class GridPoint:
    """What one split was measured to be.

    Attributes:
        experts, active, shared: the split.
        seeds: measured.
        trained: tokens trained on before that.
        nats_above_dense: mean over the seeds of the held-out loss minus the dense model's.
        half_width: of its 95 % interval over the seeds; None for one seed.
        prefill_of_dense, decode_of_dense: tokens per second over the dense model's.
        active_of_dense: active parameters over the dense model's parameters.
        dense_params: parameters of the dense model that it was measured on.
        model, data, machine: that model, the text, and where speed was measured.
    """

    experts: int
    active: int
    shared: int
    seeds: int
    trained: int
    nats_above_dense: float
    half_width: float | None
    prefill_of_dense: float
    decode_of_dense: float
    active_of_dense: float
    dense_params: int
    model: str
    data: str
    machine: str

    @property
    def split(self) -> Split:
        """The split alone."""
        return Split(self.experts, self.active, self.shared)


Speeds = dict[str, dict[str, float]]
"""Tokens per second by split ("dense" for none) and phase."""


def grid_of(
    arms: dict[str, ArmOutcome], speeds: Speeds, *, model: str, data: str, machine: str
) -> list[GridPoint]:
    """Put losses and speeds together, the smallest split first.

    Args:
        arms: of the ablation of size.
        speeds: of the same splits.
        model: that they were measured on.
        data: the text.
        machine: of the speeds.
    """
    dense = arms["dense"]
    points = []
    for name, arm in arms.items():
        split = split_named(name)
        if split is None or name not in speeds:
            continue
        found = difference(arm.after, dense.after)
        if found is None:
            continue
        ratios = {phase: speed / speeds["dense"][phase] for phase, speed in speeds[name].items()}
        points.append(
            GridPoint(
                **asdict(split),
                seeds=len(arm.after.keys() & dense.after.keys()),
                trained=arm.trained,
                nats_above_dense=found.mean,
                half_width=found.half_width,
                prefill_of_dense=ratios["prefill"],
                decode_of_dense=ratios["decode"],
                active_of_dense=arm.active_params / dense.total_params,
                dense_params=dense.total_params,
                model=model,
                data=data,
                machine=machine,
            )
        )
    return sorted(points, key=lambda point: (point.active / point.experts, point.experts))


def front(points: Sequence[GridPoint]) -> list[GridPoint]:
    """Return the points of which no other has fewer active parameters and a loss as low.

    Losses are means over the seeds.
    """
    best, found = math.inf, []
    for point in sorted(points, key=lambda p: (p.active_of_dense, p.nats_above_dense)):
        if point.nats_above_dense < best:
            best = point.nats_above_dense
            found.append(point)
    return found


def grid_csv_rows(points: Sequence[GridPoint]) -> list[list[str]]:
    """Return header and rows of a grid's file."""
    header = [field.name for field in fields(GridPoint)]
    cells = [[getattr(point, name) for name in header] for point in points]
    return [header, *[["" if cell is None else str(cell) for cell in row] for row in cells]]


def read_grid(file: Path | None = None) -> list[GridPoint]:
    """Read a grid's file, or the one that comes with moefy.

    Raises:
        UsageError: there is none, or a line is no point of a grid.
    """
    try:
        text = (file or files("moefy.studies") / GRID).read_text()
        rows = csv.DictReader(text.splitlines())
        point = TypeAdapter(GridPoint)
        return [
            point.validate_python({key: cell or None for key, cell in row.items()}) for row in rows
        ]
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read ({error.strerror}): name a folder in which `moefy study OUT "
            "--only size` has ended"
        ) from error
    except ValidationError as error:
        raise UsageError(f"{file} is no grid of this version of moefy: {error}") from error
