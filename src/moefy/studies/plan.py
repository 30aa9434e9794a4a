"""Which split of a model to take, according to the grid that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.cost import Cost, config_of, cost, split_config
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.source import BUILTIN
from moefy.errors import UsageError
from moefy.report.tables import Columns, Rows, millions, table, with_error
from moefy.studies.grid import GRID, GridPoint, read_grid

READABLE = 0.03
"""Differences between single seeds below this many nats are not read: two standard deviations over
the seeds of most splits (docs/study/262144-tokens/size.csv)."""


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def plan(
    model: str | Path,
    *,
    active_params: int | None = None,
    speedup: float | None = None,
    phase: str = "decode",
    study: str | Path | None = None,
) -> Plan:
    """Recommend a split: the lowest predicted loss within a size or at a speed.

    Parameters are counted for the model itself, from its config.json. Loss and speed are those that
    the same split was measured to have on the grid's model; nothing is interpolated. Of splits
    whose losses cannot be told from the lowest by their intervals over seeds (with a single seed,
    by `READABLE`), the fastest is taken.

    Args:
        model: dense: a folder, a config.json, or a name that `inspect` knows.
        active_params: how many parameters may run for a token.
        speedup: tokens per second over the dense model's, at least. One of the two is given.
        phase: decode or prefill: what the speedup is of, and in which the fastest is chosen.
        study: folder of a study whose ablation of size has ended; None for the grid that comes
            with moefy.

    Raises:
        UsageError: no such model, neither or both limits, or no split that reaches them: then the
            error says what is possible.
    """
    if (active_params is None) == (speedup is None):
        raise UsageError("say what you want: --active-params or --speedup, one of them")
    if phase not in ("prefill", "decode"):
        raise UsageError(f"--phase {phase}: allowed are prefill and decode")
    points = read_grid(Path(study).expanduser() / GRID if study else None)
    config = config_of(model)
    if config.get("model_type") not in FAMILIES:
        raise UsageError(f"{model} is already split, or of no family that moefy converts")
    context = min(4096, config.get("max_position_embeddings") or 4096)
    dense = cost(config, context=context)
    candidates, left_out = [], {}
    for point in sorted(points, key=lambda point: point.nats_above_dense):
        try:
            made = split_config(config, **asdict(point.split), name=str(model))
        except UsageError as error:
            left_out[point.name] = str(error)
            continue
        counted = cost(made, context=context)
        faster = getattr(point, f"{phase}_of_dense")
        # Parameters are this model's own, speed is the grid's: neither is interpolated.
        small_enough = active_params is None or counted.active_params <= active_params
        fits = small_enough and faster >= (speedup or 0)
        candidates.append(PlannedSplit(point, counted, faster, fits))
    if not candidates:
        raise UsageError(f"{model} allows no split of the grid: {next(iter(left_out.values()))}")
    fitting = [each for each in candidates if each.fits]
    if not fitting or (active_params or 0) >= dense.total_params:
        raise UsageError(_unreachable(str(model), dense, candidates, active_params, speedup, phase))
    # Of splits that cannot be told from the lowest loss, speed decides.
    equal = [each for each in fitting if _is_equal(each.point, fitting[0].point)]
    best = max(equal, key=lambda each: each.speedup)
    # A shape or a config.json has no weights, so commands cannot name it.
    has_weights = Path(model).expanduser().is_dir() or str(model) == BUILTIN
    named = str(model) if has_weights else "MODEL"
    basis = _basis(str(model), named, dense, best.point)
    command = _command(named, best.point)
    return Plan(str(model), dense, candidates, best, left_out, command, basis)


def _is_equal(one: GridPoint, lowest: GridPoint) -> bool:
    above = one.nats_above_dense - lowest.nats_above_dense
    if min(one.seeds, lowest.seeds) == 1:
        return above <= READABLE
    # The half-width of a difference of independent means; None is of a split without any seed.
    return above <= math.hypot(one.half_width or 0.0, lowest.half_width or 0.0)


def _unreachable(
    model: str,
    dense: Cost,
    candidates: Sequence[PlannedSplit],
    active_params: int | None,
    speedup: float | None,
    phase: str,
) -> str:
    """Say what is possible instead."""
    if active_params is None:
        fastest = max(candidates, key=lambda each: each.speedup)
        return (
            f"no split in the grid is {speedup:g} times as fast as the dense model: the fastest in "
            f"{phase} is {fastest.point.name}, {fastest.speedup:.2f} times"
        )
    by_size = sorted(candidates, key=lambda each: each.cost.active_params)
    sizes = [f"{each.cost.active_params:,} ({each.point.name})" for each in by_size]
    if active_params >= dense.total_params:
        return (
            f"{model} has {dense.total_params:,} parameters, so {active_params:,} active ones need "
            f"no split: ask for fewer; the grid goes from {sizes[0]} to {sizes[-1]}"
        )
    return (
        f"no split of {model} in the grid has {active_params:,} active parameters or fewer: the "
        f"smallest has {sizes[0]}, since embeddings and attention always run"
    )


def _command(model: str, point: GridPoint) -> str:
    command = f"moefy convert {model} OUT --experts {point.experts} --active {point.active}"
    command += f" --shared {point.shared}"
    if point.shared == point.active:  # static pruning, with its own choices (ablations.yaml)
        command += " --partition coactivation --set refit_ridge=0.01"
    return command


def _basis(model: str, named: str, dense: Cost, point: GridPoint) -> str:
    times = dense.total_params / point.dense_params
    seeds = "one seed" if point.seeds == 1 else f"{point.seeds} seeds"
    when = f"after {point.trained:,} tokens of training" if point.trained else "before any training"
    text = (
        f"Parameters are {model}'s own. Loss (nats above dense, {when}; text: {point.data}; "
        f"{seeds}) and speed ({point.machine}) were measured on {point.model}"
    )
    if times == 1:
        return f"{text}, which has as many parameters."
    return (
        f"{text}; {model} has {times:,.3g} times its parameters, and its own numbers will be "
        f"others: `moefy study OUT --model {named} --only size` measures them, `--study OUT` "
        "plans by them."
    )


def plan_rows(plan: Plan) -> Rows:
    """Return header and rows of a plan: its candidates, the recommended one marked."""
    columns: Columns[PlannedSplit] = [
        ("split", lambda each: each.point.name),
        ("shared", lambda each: str(each.point.shared)),
        ("active", lambda each: millions(each.cost.active_params)),
        ("of dense", lambda each: f"{each.cost.active_params / plan.dense.total_params:.0%}"),
        (
            "nats above dense",
            lambda each: with_error(each.point.nats_above_dense, each.point.half_width),
        ),
        ("prefill", lambda each: f"× {each.point.prefill_of_dense:.2f}"),
        ("decode", lambda each: f"× {each.point.decode_of_dense:.2f}"),
        (
            "meets target",
            lambda each: "recommended" if each is plan.recommended else "yes" * each.fits,
        ),
    ]
    return table(plan.candidates, columns)
