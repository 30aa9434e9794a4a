"""A plan follows from the measured grid, and says what is possible when something is not."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

import moefy
from moefy.checkpoint.cost import SHAPES, cost, split_config
from moefy.errors import UsageError
from moefy.report.tables import write_csv
from moefy.studies.plan import GridPoint, grid_rows, plan_rows, read_grid

DENSE = 134_515_008


def point(active: int, experts: int, nats: float, decode: float, **other: Any) -> GridPoint:
    return GridPoint(
        **{
            **{
                "experts": experts,
                "active": active,
                "shared": active // 2,
                "seeds": 3,
                "trained": 0,
            },
            **{"nats_above_dense": nats, "half_width": 0.02, "prefill_of_dense": decode / 2},
            **{"decode_of_dense": decode, "active_of_dense": active / experts},
            **{"dense_params": DENSE, "model": "m", "data": "d", "machine": "2 CPU threads"},
            **other,
        }
    )


POINTS = [
    point(2, 16, 2.0, 1.5),
    point(4, 16, 1.02, 1.3),
    point(4, 16, 1.5, 1.6, shared=4),
    point(16, 64, 1.0, 0.9),
    point(8, 16, 0.5, 1.1),
]


def write_grid(file: Path, points: list[GridPoint]) -> Path:
    names = [field.name for field in fields(GridPoint)]
    cells = [[getattr(point, name) for name in names] for point in points]
    write_csv(file, [names, *([str("" if c is None else c) for c in row] for row in cells)])
    return file


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return write_grid(tmp_path / "grid.csv", POINTS)


def test_the_grid_survives_its_file(grid: Path) -> None:
    points = [*POINTS, point(1, 8, 3.0, 1.0, half_width=None)]
    assert read_grid(write_grid(grid, points)) == points
    assert grid_rows(points)[3] == ["pruned 4/16", "4", "25%", "1.500 ± 0.020", "× 0.80", "× 1.60"]


def test_the_lowest_loss_within_a_size(grid: Path) -> None:
    found = moefy.plan("smollm2-135m", active_params=85_000_000, grid=grid)
    # 16/64 is lower by less than what can be read, and slower
    assert found.recommended.point == POINTS[1]
    config = split_config(SHAPES["smollm2-135m"], experts=16, active=4, shared=2)
    assert found.recommended.cost == cost(config, context=4096)
    assert found.dense.total_params == DENSE
    assert [each.fits for each in found.candidates] == [False, True, True, True, True]
    assert found.command == "moefy convert smollm2-135m OUT --experts 16 --active 4 --shared 2"
    assert "speed (2 CPU threads) were measured on m, text: d, 3 seeds" in found.basis
    rows = plan_rows(found)
    assert [row[-1] for row in rows[1:]] == ["", "yes", "recommended", "yes", "yes"]
    assert rows[3][:4] == ["4/16", "2", "56%", "1.020 ± 0.020"]
    assert rows[3][6] == "75.0M"
    json.dumps(asdict(found))


@pytest.mark.parametrize(
    ("seeds", "half_width", "taken"),
    [(3, 0.02, 1), (3, 0.01, 3), (1, None, 3)],
)
def test_what_can_be_read(tmp_path: Path, seeds: int, half_width: float | None, taken: int) -> None:
    points = [replace(point, seeds=seeds, half_width=half_width) for point in POINTS]
    grid = write_grid(tmp_path / "grid.csv", points)
    found = moefy.plan("smollm2-135m", active_params=85_000_000, grid=grid)
    assert found.recommended.point == points[taken]


def test_the_lowest_loss_at_a_speed(grid: Path) -> None:
    found = moefy.plan("llama-2-7b", speedup=1.5, grid=grid)
    assert found.recommended.point == POINTS[2]
    assert found.command == (
        "moefy convert MODEL OUT --experts 16 --active 4 --shared 4 --partition coactivation "
        "--set refit_ridge=0.01"
    )
    assert found.basis.endswith("llama-2-7b has 50.1 times its parameters.")
    found = moefy.plan("llama-2-7b", speedup=0.5, phase="prefill", grid=grid)
    assert found.recommended.point == POINTS[4]


def test_splits_that_a_model_does_not_allow(grid: Path, tmp_path: Path) -> None:
    shape = SHAPES["smollm2-135m"] | {"intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = moefy.plan(tmp_path / "config.json", speedup=0.1, grid=grid)
    assert "48 cannot be split into 64 equal experts" in found.left_out["16/64"]
    shape["intermediate_size"] = 41
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UsageError, match="allows no split of the grid: intermediate_size 41"):
        moefy.plan(tmp_path / "config.json", speedup=0.1, grid=grid)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "say what you want: --active-params or --speedup"),
        ({"active_params": 1, "speedup": 2.0}, "one of them"),
        ({"speedup": 1.0, "phase": "sleep"}, "allowed are prefill and decode"),
        (
            {"active_params": 134_515_008},
            r"smollm2-135m has 134,515,008 parameters; splits in the grid have from [\d,]+ to ",
        ),
        ({"active_params": 50_000_000}, "active ones, since embeddings and attention always run"),
        ({"speedup": 3.0}, r"up to 1.60 times as fast in decode: ask for less"),
        ({"speedup": 1.0, "phase": "prefill"}, "up to 0.80 times as fast in prefill"),
    ],
)
def test_what_cannot_be_had(grid: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        moefy.plan("smollm2-135m", grid=grid, **choices)


def test_a_file_that_is_no_grid(tmp_path: Path) -> None:
    (tmp_path / "grid.csv").write_text("experts,active\n1,2\n")
    with pytest.raises(UsageError, match="is no grid of this version"):
        moefy.plan("smollm2-135m", speedup=1.0, grid=tmp_path / "grid.csv")
