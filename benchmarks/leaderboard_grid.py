"""Make the grid that `moefy plan` reads out of a leaderboard, until a study has measured one.

    python benchmarks/leaderboard_grid.py docs/construction/leaderboard.csv smollm2-135m DATA-NAME

Losses are the leaderboard's (one seed), for moefy's default and static pruning to the stream;
speeds are measured now. `moefy study OUT --only size` and benchmarks/publish_study.py replace it.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.evaluation.cost import cost
from moefy.evaluation.inspect import split_config
from moefy.report.tables import write_csv
from moefy.studies.grid import GRID, GridPoint, Split, grid_csv_rows
from moefy.studies.recipe import StudyRecipe
from moefy.studies.speeds import machine_name, measure_speeds

ROWS = ("moefy", "static + refit to the stream")
PACKAGE = Path(__file__).resolve().parents[1] / "src/moefy/studies"


def main(board: Path, model: str, data: str) -> None:
    config = read_config(resolve(model))
    with board.open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] in ROWS]
    nats = {
        Split(*(int(row[key]) for key in ("experts", "active", "shared"))): row["nats_above_dense"]
        for row in rows
    }
    speeds = measure_speeds(config, sorted(nats), StudyRecipe())
    params = cost(config).total_params
    points = []
    for split in sorted(nats):
        active = cost(split_config(config, **vars(split))).active_params
        points.append(
            GridPoint(
                **vars(split),
                seeds=1,
                trained=0,
                nats_above_dense=float(nats[split]),
                half_width=None,
                prefill_of_dense=speeds[split.name]["prefill"] / speeds["dense"]["prefill"],
                decode_of_dense=speeds[split.name]["decode"] / speeds["dense"]["decode"],
                active_of_dense=active / params,
                dense_params=params,
                model=model,
                data=data,
                machine=machine_name(),
            )
        )
    write_csv(PACKAGE / GRID, grid_csv_rows(points))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
