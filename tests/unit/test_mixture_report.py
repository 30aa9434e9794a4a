"""The mixture's history as a figure and as a table."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moefy.data.mixture import Mixture, WeightUpdate
from moefy.data.strategies import llama_moe_update
from moefy.report.charts import mixture_chart


@pytest.fixture
def log() -> list[dict[str, Any]]:
    """Six steps of 1000 tokens, weights renewed before the fifth."""
    mixture = Mixture(
        {"a": 9, "b": 9, "c": 0}, {"a": 0.9, "b": 0.1, "c": 0.0}, seed=0, global_batch_size=2
    )
    lines: list[dict[str, Any]] = []
    for step in range(6):
        line: dict[str, Any] = {"step": step + 1, "tokens": 1000 * (step + 1)}
        if step == 0:
            line["mixture"] = asdict(WeightUpdate(0, mixture.weights, {}, {}))
        if mixture.update_due(4):
            losses = {"a": 2.0, "b": 3.5}
            update = mixture.reweight(losses, {"a": 2.0, "b": 2.5}, llama_moe_update)
            line["mixture"] = asdict(update)
        mixture.next_batch()
        lines.append(line)
    return lines


def test_the_figure_shows_each_weight_from_its_step_to_the_next(log: list[dict[str, Any]]) -> None:
    (axes,) = mixture_chart("mixture", log, "").figure.axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert set(lines) == {"a", "b"}  # c was left out
    assert [float(x) for x in lines["b"].get_xdata()] == [0, 4, 6]
    renewed = log[4]["mixture"]["weights"]["b"]
    assert 0.1 < renewed < 0.3
    assert [float(y) for y in lines["b"].get_ydata()] == [0.1, renewed, renewed]
    assert {line.get_drawstyle() for line in lines.values()} == {"steps-post"}


def test_the_table_holds_the_whole_history(log: list[dict[str, Any]], tmp_path: Path) -> None:
    mixture_chart("mixture", log, "").write(tmp_path)
    with (tmp_path / "mixture.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["tokens"], row["domain"]) for row in rows] == [
        (str(step), str(1000 * step), domain) for step in (0, 4) for domain in "abc"
    ]
    assert [row["loss"] for row in rows] == ["", "", "", "2.0", "3.5", ""]
    assert [row["reference"] for row in rows] == ["", "", "", "2.0", "2.5", ""]
    found = [float(row["weight"]) for row in rows]
    assert found == [w for step in (0, 4) for w in log[step]["mixture"]["weights"].values()]
