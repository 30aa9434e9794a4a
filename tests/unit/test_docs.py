"""The tables in docs/ are those that the committed CSV files give."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

from moefy.report.tables import markdown

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["construction", "experiments/prototype"])
def test_the_construction_tables(folder: str) -> None:
    nats_rows = runpy.run_path(str(ROOT / "benchmarks/publish_construction.py"))["nats_rows"]
    table = markdown(nats_rows(ROOT / "docs" / folder / "leaderboard.csv"))
    assert table in (ROOT / "docs/construction.md").read_text()


@pytest.mark.parametrize("name", ["agreement", "speed"])
def test_the_runtimes_tables(name: str) -> None:
    with (ROOT / f"docs/runtimes/{name}.csv").open() as file:
        rows = list(csv.reader(file))
    assert markdown(rows) in (ROOT / "docs/runtimes.md").read_text()


def test_the_objectives_table() -> None:
    with (ROOT / "docs/training/output-loss.csv").open() as file:
        rows = list(csv.reader(file))
    assert markdown(rows) in (ROOT / "docs/objective.md").read_text()
