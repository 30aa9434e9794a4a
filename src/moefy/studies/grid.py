"""The grid of splits: the loss of each, and how fast it runs compared with the dense model."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from moefy.checkpoint.cost import split_config
from moefy.errors import UsageError
from moefy.evaluation.timing import Contender, Setting, in_transformers
from moefy.hardware import device
from moefy.progress import ProgressFn
from moefy.report.tables import Columns, Rows, table, with_error, write_csv
from moefy.split import Split
from moefy.storage import replace_file, storage_errors
from moefy.studies.recipe import StudyRecipe
from moefy.studies.runs import Run
from moefy.studies.summary import difference

GRID, SPEED = "grid.csv", "speed.json"


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
    def split(self) -> Split:
        """The three counts as one value."""
        return Split(self.experts, self.active, self.shared)

    @property
    def name(self) -> str:
        """Name of the arm of the ablation of size."""
        pruned = "pruned " if self.shared == self.active else ""
        return f"{pruned}{self.active}/{self.experts}"


def machine_name() -> str:
    """Say what speeds and losses are measured on."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} CPU thread{'s' if count > 1 else ''}"


def measure_speeds(
    out: Path,
    splits: Mapping[str, Split],
    config: Mapping[str, Any],
    recipe: StudyRecipe,
    report: ProgressFn,
) -> None:
    """Time the splits, by the name of their arm, and write `speed.json`, unless that was done.

    One sequence at once, the fastest expert implementation of each phase, medians over the rounds.
    """
    about = {
        "splits": {name: asdict(split) for name, split in splits.items()},
        "machine": machine_name(),
        **{name: getattr(recipe, name) for name in ("prompt_tokens", "new_tokens", "rounds")},
    }
    file = out / SPEED
    if file.is_file() and json.loads(file.read_text())["about"] == about:
        return
    # Speed does not depend on the weights: they are random, and nothing is read or dequantised.
    plain = {key: config[key] for key in config if key != "quantization_config"}
    models = {"dense": plain}
    models |= {name: split_config(plain, **asdict(split)) for name, split in splits.items()}
    contenders = [Contender(name, model) for name, model in models.items()]
    setting = Setting((1,), recipe.prompt_tokens, recipe.new_tokens, recipe.rounds, torch.float32)
    speeds: dict[str, dict[str, float]] = {name: {} for name in models}
    for (i, phase, _), measured in in_transformers(contenders, setting, report).items():
        best = min(statistics.median(values) for values in measured.values())
        tokens = recipe.prompt_tokens if phase == "prefill" else 1
        speeds[contenders[i].name][phase] = tokens / best
    replace_file(file, json.dumps({"about": about, "tokens_per_s": speeds}, indent=2) + "\n")


def write_grid(out: Path, arms: Mapping[str, list[Run]], model: str, data: str) -> None:
    """Put losses and speeds together in `grid.csv`, the smallest split first.

    Without a `speed.json` in the study's folder there is no grid.
    """
    if not (out / SPEED).is_file() or "dense" not in arms:
        return
    found = json.loads((out / SPEED).read_text())
    about, speeds, dense = found["about"], found["tokens_per_s"], arms["dense"][0]
    points = []
    for name, split in about["splits"].items():
        runs = arms.get(name, [])
        above = difference(runs, arms["dense"])
        if above is None:  # it has speeds, but no run with a seed of the dense model's
            continue
        faster = {phase: speed / speeds["dense"][phase] for phase, speed in speeds[name].items()}
        points.append(
            GridPoint(
                **split,
                seeds=len(runs),
                trained=runs[0].trained,
                nats_above_dense=above.mean,
                half_width=above.half_width,
                prefill_of_dense=faster["prefill"],
                decode_of_dense=faster["decode"],
                active_of_dense=runs[0].active_params / dense.total_params,
                dense_params=dense.total_params,
                model=model,
                data=data,
                machine=about["machine"],
            )
        )
    points.sort(key=lambda point: (point.active / point.experts, point.experts))
    with storage_errors(out):
        write_csv(out / GRID, csv_rows(points))


def csv_rows(points: list[GridPoint]) -> Rows:
    """Return header and rows of a grid's file, which `read_grid` reads back."""
    names = [field.name for field in fields(GridPoint)]
    cells = [[getattr(point, name) for name in names] for point in points]
    return [names, *[["" if cell is None else str(cell) for cell in row] for row in cells]]


def read_grid(file: Path | None = None) -> list[GridPoint]:
    """Read a grid's file, or the one that comes with moefy.

    Raises:
        UsageError: there is none, or a line is no point of a grid.
    """
    try:
        text = (file or files("moefy.studies") / GRID).read_text()
        rows = [{k: v or None for k, v in row.items()} for row in csv.DictReader(text.splitlines())]
        return TypeAdapter(list[GridPoint]).validate_python(rows)
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read ({error.strerror}): name a folder in which `moefy study OUT "
            "--only size` has ended"
        ) from error
    except ValidationError as error:
        raise UsageError(f"{file} is no grid of this version of moefy: {error}") from error


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
