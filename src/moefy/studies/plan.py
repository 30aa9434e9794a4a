"""Which split of a model to take, according to a grid of splits that was measured."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moefy.checkpoint.cost import Cost, config_of, cost, split_config
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.source import BUILTIN
from moefy.errors import UsageError
from moefy.report.frontier import SIZE, Design
from moefy.report.tables import Columns, Rows, millions, table, with_error

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


@dataclass(frozen=True)
class PlannedSplit:
    """One split of the model."""

    point: GridPoint  # measured of this split, on the grid's model
    cost: Cost  # counted for this model
    speedup: float  # tokens per second over the dense model's, in the wanted phase
    fits: bool  # it meets the target


@dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    model: str
    dense: Cost
    candidates: list[PlannedSplit]  # that the model allows, the best predicted loss first
    recommended: PlannedSplit
    left_out: dict[str, str]  # splits that the model does not allow, and why
    command: str  # what makes the recommended split
    basis: str  # what the prediction rests on


def read_grid(file: Path | None = None) -> list[GridPoint]:
    """Read a grid's file, or the one that comes with moefy.

    Raises:
        UsageError: a line is no point of a grid.
    """
    text = (file or files("moefy.studies") / GRID).read_text()
    rows = [{k: v or None for k, v in row.items()} for row in csv.DictReader(text.splitlines())]
    try:
        return TypeAdapter(list[GridPoint]).validate_python(rows)
    except ValidationError as error:
        raise UsageError(f"{file} is no grid of this version of moefy: {error}") from error


def plan(
    model: str | Path,
    *,
    active_params: int | None = None,
    speedup: float | None = None,
    phase: str = "decode",
    grid: Path | None = None,
) -> Plan:
    """Recommend a split: the lowest predicted loss within a size or at a speed.

    Parameters are counted for the model itself, from its config.json. Loss and speed are those that
    the same split was measured to have on the grid's model; nothing is interpolated. Of splits
    whose losses cannot be told from the lowest by their intervals over seeds, the fastest is taken.

    Args:
        model: dense: a folder, a config.json, or a name that `inspect` knows.
        active_params: how many parameters may run for a token.
        speedup: tokens per second over the dense model's, at least. One of the two is given.
        phase: decode or prefill: what the speedup is of, and in which the fastest is chosen.
        grid: CSV file of a grid; None for the one that comes with moefy.

    Raises:
        UsageError: no such model, neither or both limits, or no split that reaches them: then the
            error says what is possible.
    """
    if (active_params is None) == (speedup is None):
        raise UsageError("say what you want: --active-params or --speedup, one of them")
    if phase not in ("prefill", "decode"):
        raise UsageError(f"--phase {phase}: allowed are prefill and decode")
    points = sorted(read_grid(grid), key=lambda point: point.nats_above_dense)
    config = config_of(model)
    if config.get("model_type") not in FAMILIES:
        raise UsageError(f"{model} is already split, or of no family that moefy converts")
    context = min(4096, config.get("max_position_embeddings") or 4096)
    dense = cost(config, context=context)
    candidates, left_out = [], {}
    for point in points:
        split = {key: getattr(point, key) for key in ("experts", "active", "shared")}
        try:
            counted = cost(split_config(config, **split, name=str(model)), context=context)
        except UsageError as error:
            left_out[point.name] = str(error)
            continue
        faster = getattr(point, f"{phase}_of_dense")
        small_enough = active_params is None or counted.active_params <= active_params
        fits = small_enough and faster >= (speedup or 0)
        candidates.append(PlannedSplit(point, counted, faster, fits))
    if not candidates:
        raise UsageError(f"{model} allows no split of the grid: {next(iter(left_out.values()))}")
    fitting = [each for each in candidates if each.fits]
    if not fitting or (active_params or 0) >= dense.total_params:
        sizes = [each.cost.active_params for each in candidates]
        fastest = max(each.speedup for each in candidates)
        raise UsageError(
            f"{model} has {dense.total_params:,} parameters; splits in the grid have from "
            f"{min(sizes):,} to {max(sizes):,} active ones, since embeddings and attention always "
            f"run, and are up to {fastest:.2f} times as fast in {phase}: ask for less"
        )
    # Of splits that cannot be told from the lowest loss, speed decides. The half-width of a
    # difference of independent means; None is of a split without any seed.
    lowest = fitting[0].point
    equal = [
        each
        for each in fitting
        if each.point.nats_above_dense - lowest.nats_above_dense
        <= math.hypot(each.point.half_width or 0.0, lowest.half_width or 0.0)
    ]
    best = max(equal, key=lambda each: each.speedup)
    # A shape or a config.json has no weights, so commands cannot name it.
    has_weights = Path(model).expanduser().is_dir() or str(model) == BUILTIN
    command = _command(str(model) if has_weights else "MODEL", best.point)
    basis = (
        f"Parameters are {model}'s own. Loss and speed ({best.point.machine}) were measured on "
        f"{best.point.model}, text: {best.point.data}, {best.point.seeds} seeds, before training; "
        f"{model} has {dense.total_params / best.point.dense_params:,.3g} times its parameters."
    )
    return Plan(str(model), dense, candidates, best, left_out, command, basis)


def _command(model: str, point: GridPoint) -> str:
    command = f"moefy convert {model} OUT --experts {point.experts} --active {point.active}"
    command += f" --shared {point.shared}"
    if point.shared == point.active:  # static pruning, with its own choices (ablations.yaml)
        command += " --partition coactivation --set refit_ridge=0.01"
    return command


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


def plan_rows(plan: Plan) -> Rows:
    """Return header and rows of a plan: the grid's, counted for the model, and what is chosen."""
    rows = grid_rows([each.point for each in plan.candidates])
    rows[0] += ["active parameters", "meets target"]
    for row, each in zip(rows[1:], plan.candidates, strict=True):
        row[2] = f"{each.cost.active_params / plan.dense.total_params:.0%}"
        row += [millions(each.cost.active_params)]
        row += ["recommended" if each is plan.recommended else "yes" * each.fits]
    return rows
