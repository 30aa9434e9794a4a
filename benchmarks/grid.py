"""Time the splits of a study's ablation of size, and write its grid, which `moefy plan` reads.

    moefy study OUT --model MODEL --only size
    python benchmarks/grid.py OUT MODEL          # OUT/grid.csv, and OUT/size.png over it

One sequence at once, random weights, the fastest expert implementation of each phase.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import moefy
from moefy.report.tables import write_csv
from moefy.studies.plan import GRID, GridPoint, read_grid
from moefy.studies.report import arms_in, difference


def measure(model: str, split: dict[str, int], work: Path) -> dict[str, float]:
    """Return tokens per second over the dense model's, by phase."""
    moe = work / "-".join(map(str, split.values()))
    plain: dict[str, Any] = {"partition": "random", "router": "random", "repair": "none"}
    moefy.convert(model, moe, **split, **plain)
    sizes: dict[str, Any] = {"batches": [1], "prompt_tokens": 128, "new_tokens": 32}
    rows = {
        (row.phase, row.model): row.tokens_per_s
        for row in moefy.bench([model, moe], names=["dense", "moe"], **sizes).speeds
    }
    return {phase: rows[phase, "moe"] / rows[phase, "dense"] for phase in ("prefill", "decode")}


def points_of(out: Path, model: str) -> list[GridPoint]:
    arms, about = arms_in(out)["size"], json.loads((out / ".moefy.json").read_text())
    dense, points = arms["dense"][0], []
    for name, runs in arms.items():
        above = difference(runs, arms["dense"])
        if name == "dense" or above is None:
            continue
        active, experts = map(int, name.removeprefix("pruned ").split("/"))
        shared = active if name.startswith("pruned") else active // 2
        split = {"experts": experts, "active": active, "shared": shared}
        faster = measure(model, split, out / "work")
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
                model=Path(model).name,
                data=Path(about["identity"]["data"]).name,
                machine=runs[0].machine,
            )
        )
    return sorted(points, key=lambda point: (point.active / point.experts, point.experts))


def figure_of(points: list[GridPoint]) -> Figure:
    """Draw loss above dense over active parameters and over both speeds."""
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    groups: dict[str, list[GridPoint]] = {}
    for point in sorted(points, key=lambda point: point.active_of_dense):
        name = "pruned" if point.shared == point.active else f"{point.experts} slices"
        groups.setdefault(name, []).append(point)
    for axes, measured in zip(panels, ("active", "prefill", "decode"), strict=True):
        for name, found in groups.items():
            axes.errorbar(
                [getattr(point, f"{measured}_of_dense") for point in found],
                [point.nats_above_dense for point in found],
                yerr=[point.half_width or 0.0 for point in found],
                fmt="s" if name == "pruned" else "o",
                linestyle="-" if measured == "active" else "none",
                markersize=4,
                label=name,
            )
        label = "active parameters" if measured == "active" else f"{measured} speed"
        axes.set(xlabel=f"{label} / dense model")
    panels[0].set(ylabel="nats above dense")
    panels[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    out = Path(sys.argv[1])
    names = [field.name for field in fields(GridPoint)]
    rows = [[getattr(point, name) for name in names] for point in points_of(out, sys.argv[2])]
    write_csv(out / GRID, [names, *(["" if c is None else str(c) for c in row] for row in rows)])
    figure_of(read_grid(out / GRID)).savefig(out / "size.png", dpi=150)
