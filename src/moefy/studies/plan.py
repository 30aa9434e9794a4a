"""Which split of a model to take, out of the grid that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.cost import Cost, cost
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.inspect import config_of, split_config
from moefy.checkpoint.source import BUILTIN
from moefy.errors import UsageError
from moefy.studies.grid import GRID, GridPoint, read_grid

READABLE = 0.03
"""Of one seed, differences below this many nats are not to be read: two standard deviations over
the seeds of most splits (docs/study/262144-tokens/size.csv)."""


@dataclass(frozen=True)
class Candidate:
    """One split of the model.

    Attributes:
        point: what was measured of this split, on the grid's model.
        cost: counted for this model.
        fits: whether it is what was asked for.
    """

    point: GridPoint
    cost: Cost
    fits: bool

    def speed(self, phase: str) -> float:
        """Return tokens per second over the dense model's, as measured on the grid's model."""
        return self.point.decode_of_dense if phase == "decode" else self.point.prefill_of_dense


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        model: as named.
        dense: cost of the dense model.
        candidates: every split of the grid that this model allows, the best predicted loss first.
        recommended: one of them.
        left_out: splits that the model does not allow, and why.
        command: what makes the recommended one; MODEL is its folder, where only a shape was named.
        basis: what the prediction rests on.
    """

    model: str
    dense: Cost
    candidates: list[Candidate]
    recommended: Candidate
    left_out: dict[str, str]
    command: str
    basis: str

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
    for point in points:
        try:
            counted = _cost(config, point, context, str(model))
        except UsageError as error:
            left_out[point.split.name] = str(error)
            continue
        found = Candidate(point, counted, fits=True)
        if active_params is not None:
            fits = counted.active_params <= active_params
        else:
            assert speedup is not None
            fits = found.speed(phase) >= speedup
        candidates.append(Candidate(point, counted, fits))
    if not candidates:
        raise UsageError(f"{model} allows no split of the grid: {next(iter(left_out.values()))}")
    candidates.sort(key=lambda candidate: candidate.point.nats_above_dense)
    _check_reachable(str(model), dense, candidates, active_params, speedup, phase)
    recommended = _best([each for each in candidates if each.fits], phase)
    return Plan(
        str(model),
        dense,
        candidates,
        recommended,
        left_out,
        _command(_convertible(model), recommended.point),
        _basis(str(model), dense, recommended.point),
    )


def _cost(config: Mapping[str, Any], point: GridPoint, context: int, name: str) -> Cost:
    return cost(split_config(config, **asdict(point.split), name=name), context=context)


def _best(fitting: Sequence[Candidate], phase: str) -> Candidate:
    lowest = fitting[0].point
    equal = [
        each
        for each in fitting
        if each.point.nats_above_dense - lowest.nats_above_dense <= _readable(each.point, lowest)
    ]
    return max(equal, key=lambda candidate: candidate.speed(phase))


def _readable(one: GridPoint, other: GridPoint) -> float:
    """Return the smallest difference in nats that is more than chance between seeds."""
    if min(one.seeds, other.seeds) == 1:
        return READABLE
    return math.hypot(one.half_width or 0.0, other.half_width or 0.0)  # None: of no seed


def _check_reachable(
    model: str,
    dense: Cost,
    candidates: list[Candidate],
    active_params: int | None,
    speedup: float | None,
    phase: str,
) -> None:
    small, large = (
        pick(candidates, key=lambda candidate: candidate.cost.active_params) for pick in (min, max)
    )
    if active_params is not None and active_params >= dense.total_params:
        raise UsageError(
            f"{model} has {dense.total_params:,} parameters, so {active_params:,} active ones need "
            f"no split: ask for fewer; the grid goes from {_size(small)} to {_size(large)}"
        )
    if any(candidate.fits for candidate in candidates):
        return
    if active_params is not None:
        raise UsageError(
            f"no split of {model} in the grid has {active_params:,} active parameters or fewer: "
            f"the smallest has {_size(small)}, since embeddings and attention always run"
        )
    fastest = max(candidates, key=lambda candidate: candidate.speed(phase))
    raise UsageError(
        f"no split in the grid is {speedup:g} times as fast as the dense model: the fastest in "
        f"{phase} is {fastest.point.split.name}, {fastest.speed(phase):.2f} times"
    )


def _size(candidate: Candidate) -> str:
    return f"{candidate.cost.active_params:,} ({candidate.point.split.name})"


def _convertible(model: str | Path) -> str:
    """Return how commands may name the model: a shape or a config.json has no weights."""
    found = Path(model).expanduser().is_dir() or str(model) == BUILTIN
    return str(model) if found else "MODEL"


def _command(model: str, point: GridPoint) -> str:
    command = f"moefy convert {model} OUT --experts {point.experts} --active {point.active}"
    command += f" --shared {point.shared}"
    if point.shared == point.active:
        command += " --partition coactivation --set refit_ridge=0.01"
    return command


def _basis(model: str, dense: Cost, point: GridPoint) -> str:
    times = dense.total_params / point.dense_params
    seeds = "one seed" if point.seeds == 1 else f"{point.seeds} seeds"
    when = f"after {point.trained:,} tokens of training" if point.trained else "before any training"
    text = (
        f"Parameters are {model}'s own. Loss (nats above dense, {when}; text: {point.data}; "
        f"{seeds}) and speed ({point.machine}) were measured on {point.model}"
    )
    if times == 1:
        return f"{text}, which has as many parameters."
    far = f"{times:,.1f} times" if times > 1 else f"1/{1 / times:,.1f} of"
    return (
        f"{text}; {model} has {far} its parameters, and its own numbers will be others: "
        f"`moefy study OUT --model {_convertible(model)} --only size` measures them, `--study OUT` "
        "plans by them."
    )
