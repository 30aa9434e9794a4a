"""Which split of a model to take, by speeds that were measured at its shape or near it."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import numpy as np

from moefy.checkpoint.cost import SHAPES, Cost, config_of, cost, split_within
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.source import BUILTIN
from moefy.errors import UsageError
from moefy.report.tables import Columns, Rows, millions, read_rows, shown, table
from moefy.split import PRESETS, Split

T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredSplit:
    """A row of speed.csv, which benchmarks/frontier.py writes."""

    shape: str  # a name in `SHAPES`
    experts: int
    active: int
    shared: int
    prefill: float  # tokens per second over the dense model's
    decode: float
    measured: str  # in what, and on what
    nats: float | None  # held-out loss of SmolLM2-135M, split like this, above the dense model's


@dataclass(frozen=True)
class PlannedSplit:
    """One split of the model."""

    split: Split
    cost: Cost  # counted for this model
    prefill: float  # tokens per second over the dense model's
    decode: float
    nats: float | None  # see `MeasuredSplit`
    source: str  # what the speeds were measured of; between two the speeds are interpolated
    fits: bool  # it meets the target


@dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    model: str
    dense: Cost
    candidates: list[PlannedSplit]  # the largest active share first
    recommended: PlannedSplit
    command: str  # what makes the recommended split
    basis: str  # what the numbers rest on


@cache
def measured_splits() -> list[MeasuredSplit]:
    """Return the speeds that come with moefy."""
    return read_rows((files("moefy.studies") / "speed.csv").read_text(), MeasuredSplit)


def plan(
    model: str | Path,
    *,
    speedup: float | None = None,
    active_params: int | None = None,
    preset: str | None = None,
    phase: str = "decode",
) -> Plan:
    """Recommend a split: the largest active share at a speed or within a size.

    Parameters are counted for the model itself, from its config.json. Speeds are those that the
    same share was measured to have, interpolated over the number of slices and over the shapes that
    were measured; beyond them the nearest counts. Of equal shares the finest split is taken.

    Args:
        model: dense: a folder, a config.json, or a name that `inspect` knows.
        speedup: tokens per second over the dense model's, at least.
        active_params: how many parameters may run for a token.
        preset: "speed" or "quality": slices as `convert --for` makes them. One of these three at
            least is given; None for all splits that were measured.
        phase: decode or prefill: what the speedup is of.

    Raises:
        UsageError: no such model, no target, or no split that reaches it: then the error says what
            is possible.
    """
    if speedup is None and active_params is None and preset is None:
        raise UsageError("say what you want: --speedup, --active-params or --for")
    if phase not in ("prefill", "decode") or preset not in (None, *PRESETS):
        raise UsageError(
            f"--phase {phase} --for {preset}: allowed are prefill and decode; {', '.join(PRESETS)}"
        )
    config = config_of(model)
    if config.get("model_type") not in FAMILIES:
        raise UsageError(f"{model} is already split, or of no family that moefy converts")
    context = min(4096, config.get("max_position_embeddings") or 4096)
    dense, found = cost(config, context=context), dict[Split, PlannedSplit]()
    for split in _candidates(config["intermediate_size"], preset):
        try:
            split, made = split_within(config, split, str(model))
        except UsageError as error:
            refused = error
            continue
        counted = cost(made, context=context)
        speeds, source = _speeds(split, dense.total_params)
        fast = round(speeds[phase], 2) >= (speedup or 0)  # as the table shows it
        fits = fast and (active_params is None or counted.active_params <= active_params)
        same = [each for each in measured_splits() if _split(each) == split]
        nats = next((each.nats for each in same), None)
        planned = PlannedSplit(
            split, counted, speeds["prefill"], speeds["decode"], nats, source, fits
        )
        found[split] = planned
    if not found:
        raise refused
    # of a preset alone, its own number of active slices comes first
    fitting = [each for each in found.values() if each.fits]
    best = min(fitting, key=_order, default=None) if speedup or active_params else fitting[0]
    candidates = sorted(found.values(), key=_order)
    if best is None:
        sizes = [each.cost.active_params for each in candidates]
        fastest = max(getattr(each, phase) for each in candidates)
        raise UsageError(
            f"{model} has {dense.total_params:,} parameters; these splits have from "
            f"{min(sizes):,} to {max(sizes):,} active ones, since embeddings and attention always "
            f"run, and are up to {fastest:.2f} times as fast in {phase}: ask for less"
        )
    # A shape or a config.json has no weights, so commands cannot name it.
    has_weights = Path(model).expanduser().is_dir() or str(model) == BUILTIN
    named = shlex.quote(str(model)) if has_weights else "MODEL"
    command = f"moefy convert {named} out/moe" + "".join(
        f" --{name} {count}" for name, count in asdict(best.split).items()
    )
    basis = (
        f"Parameters are {model}'s own. Speeds over the dense model were measured with "
        f"{measured_splits()[0].measured}; nats above dense are those of SmolLM2-135M, converted "
        "with the usual effort, where they are known."
    )
    return Plan(str(model), dense, candidates, best, command, basis)


def _order(each: PlannedSplit) -> tuple[float, int]:
    return -each.split.active / each.split.experts, -each.split.experts


def _candidates(intermediate_size: int, preset: str | None) -> list[Split]:
    """Return splits whose speed is known or lies between known ones; a preset's own first."""
    if preset is None:
        found = [_split(row) for row in measured_splits() if row.shared < row.active]
    else:
        first = Split.of(intermediate_size, preset=preset)
        counts = {first.active, *(round(share * first.experts) for share in (0.25, 0.5, 0.75))}
        part = PRESETS[preset].shared
        found = [first] + [Split(first.experts, k, int(part * k)) for k in sorted(counts)[::-1]]
    return list(dict.fromkeys(found))


def _split(row: MeasuredSplit) -> Split:
    return Split(row.experts, row.active, row.shared)


def _speeds(split: Split, total_params: int) -> tuple[dict[str, float], str]:
    """Return a split's speeds over a dense model of this size, and what they come from."""
    used: set[str] = set()

    def at(shape: str, phase: str) -> float:
        # of the nearest active share, for every number of slices the nearest shared one
        rows = [r for r in measured_splits() if r.shape == shape and r.shared < r.active]
        apart = [abs(r.active / r.experts - split.active / split.experts) for r in rows]
        near = [r for r, far in zip(rows, apart, strict=True) if far < min(apart) + 0.03]
        near.sort(key=lambda r: -abs(r.shared / r.active - split.shared / split.active))
        ends = _around({r.experts: r for r in near}, split.experts)
        used.update(f"{r.active}/{r.experts}+{r.shared} of {r.shape}" for r in ends.values())
        return _between({n: getattr(r, phase) for n, r in ends.items()}, split.experts)

    names = {cost(SHAPES[row.shape]).total_params: row.shape for row in measured_splits()}
    ends = _around(names, total_params)
    found = {
        phase: _between({n: at(shape, phase) for n, shape in ends.items()}, total_params)
        for phase in ("prefill", "decode")
    }
    return found, ", ".join(sorted(used))


def _around(known: dict[int, T], wanted: int) -> dict[int, T]:
    """Return what is known next below and next above a number."""
    numbers = sorted(known)
    ends = [n for n in numbers if n <= wanted][-1:] + [n for n in numbers if n >= wanted][:1]
    return {n: known[n] for n in ends}


def _between(known: dict[int, float], wanted: int) -> float:
    """Interpolate over the logarithm; beyond what is known the nearest counts."""
    return float(np.interp(math.log(wanted), [*map(math.log, known)], [*known.values()]))


def plan_rows(plan: Plan) -> Rows:
    """Return header and rows of a plan: what every split costs, and where its speed is from."""
    columns: Columns[PlannedSplit] = [
        ("split", lambda each: f"{each.split.active}/{each.split.experts}"),
        ("shared", lambda each: str(each.split.shared)),
        ("active", lambda each: millions(each.cost.active_params)),
        ("of dense", lambda each: f"{each.cost.active_params / plan.dense.total_params:.0%}"),
        ("prefill", lambda each: f"× {each.prefill:.2f}"),
        ("decode", lambda each: f"× {each.decode:.2f}"),
        ("speed measured of", lambda each: each.source),
        ("nats above dense", lambda each: shown(each.nats, ".3f")),
        (
            "meets target",
            lambda each: "recommended" if each == plan.recommended else "yes" * each.fits,
        ),
    ]
    return table(plan.candidates, columns)
