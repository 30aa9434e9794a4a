"""Make the grid that `moefy plan` reads out of what docs/ has, until a study has measured one.

    python benchmarks/leaderboard_grid.py

Losses are docs/construction/leaderboard.csv's (one seed), for moefy's default and static pruning to
the stream; speeds are docs/runtimes/transformers.csv's (one sequence), which knows half of the FFN
alone. `moefy study OUT --only size` and benchmarks/publish_study.py replace it.
"""

from __future__ import annotations

import csv
from pathlib import Path

from moefy.evaluation.cost import cost
from moefy.evaluation.inspect import SHAPES, split_config
from moefy.report.tables import write_csv
from moefy.studies.grid import GRID, GridPoint, Split, grid_csv_rows

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {
    Split(64, 32, 16): ("moefy", "MoE 32/64, 16 shared"),
    Split(64, 32, 32): ("static + refit to the stream", "dense of the active size"),
}


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / name).open() as file:
        return list(csv.DictReader(file))


def main() -> None:
    nats = {
        (row["method"], Split(*(int(row[key]) for key in ("experts", "active", "shared")))): row
        for row in rows_of("construction/leaderboard.csv")
    }
    speeds = {
        (row["model"], row["phase"]): float(row["tok/s"].replace(",", ""))
        for row in rows_of("runtimes/transformers.csv")
        if row["batch"] == "1"
    }
    config = SHAPES["smollm2-135m"]
    params = cost(config).total_params
    points = []
    for split, (method, timed) in SPLITS.items():
        ratios = {
            f"{phase}_of_dense": speeds[timed, phase] / speeds["dense", phase]
            for phase in ("prefill", "decode")
        }
        points.append(
            GridPoint(
                **vars(split),
                **ratios,
                seeds=1,
                trained=0,
                nats_above_dense=float(nats[method, split]["nats_above_dense"]),
                half_width=None,
                active_of_dense=cost(split_config(config, **vars(split))).active_params / params,
                dense_params=params,
                model="smollm2-135m",
                data="seven SlimPajama domains",
                machine="2 CPU threads",
            )
        )
    write_csv(ROOT / "src/moefy/studies" / GRID, grid_csv_rows(points))


if __name__ == "__main__":
    main()
