"""Losses of a study's splits over their speeds: what `plan` reads, and the figure of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moefy.checkpoint.cost import split_config
from moefy.checkpoint.reader import read_config
from moefy.evaluation.contenders import Contender
from moefy.evaluation.speed import Phase, relative_speeds
from moefy.progress import ProgressFn, silent
from moefy.report.tables import write_csv
from moefy.studies.points import GRID, GridPoint, read_grid
from moefy.studies.report import Arms, difference

_PROMPT, _NEW = 128, 32  # tokens
Speeds = Mapping[Phase, float]
"""Tokens per second over the dense model's, by phase."""


def write_grid(
    out: Path,
    splits: Mapping[str, Mapping[str, Any]],  # by arm: experts, active, shared
    arms: Arms,
    dense: Path,
    about: Mapping[str, Any],  # model, data, machine
    report: ProgressFn = silent,
) -> None:
    """Write the grid of a study's ablation of size; speeds that this machine measured are kept."""
    splits = {name: splits[name] for name in arms if name in splits}
    file, speeds = out / GRID, dict[str, Speeds]()
    if file.is_file():
        known = [point for point in read_grid(file) if point.machine == about["machine"]]
        speeds = {
            point.name: {"prefill": point.prefill_of_dense, "decode": point.decode_of_dense}
            for point in known
        }
    if not speeds.keys() >= splits.keys():
        speeds = speeds_of(read_config(dense), splits, report)
    total, points = arms["dense"][0].total_params, []
    for name, split in splits.items():
        above = difference(arms[name], arms["dense"])
        if above is not None:
            point = GridPoint(
                **split,
                seeds=len(arms[name]),
                trained=arms[name][0].trained,
                nats_above_dense=above.mean,
                half_width=above.half_width,
                prefill_of_dense=speeds[name]["prefill"],
                decode_of_dense=speeds[name]["decode"],
                active_of_dense=arms[name][0].active_params / total,
                dense_params=total,
                **about,
            )
            points.append(point)
    points.sort(key=lambda point: (point.active / point.experts, point.experts))
    names = [field.name for field in fields(GridPoint)]
    cells = [[getattr(point, name) for name in names] for point in points]
    write_csv(file, [names, *(["" if c is None else str(c) for c in row] for row in cells)])


def speeds_of(
    dense: Mapping[str, Any], splits: Mapping[str, Mapping[str, Any]], report: ProgressFn = silent
) -> dict[str, Speeds]:
    """Time splits with random weights in transformers, beside the dense model, one sequence."""
    contenders = [Contender("dense", dense)]
    contenders += [Contender(name, split_config(dense, **split)) for name, split in splits.items()]
    found = relative_speeds(contenders, prompt_tokens=_PROMPT, new_tokens=_NEW, report=report)
    return dict(zip(splits, found[1:], strict=True))
