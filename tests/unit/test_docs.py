"""The tables in docs/ are those that the committed CSV files give."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

from moefy.report.tables import markdown
from moefy.studies.grid import read_grid
from moefy.studies.report import page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["construction", "experiments/prototype"])
def test_the_construction_tables(folder: str) -> None:
    nats_rows = runpy.run_path(str(ROOT / "benchmarks/publish_construction.py"))["nats_rows"]
    table = markdown(nats_rows(ROOT / "docs" / folder / "leaderboard.csv"))
    assert table in (ROOT / "docs/construction.md").read_text()


def test_the_runtimes_tables() -> None:
    with (ROOT / "docs/runtimes/speed.csv").open() as file:
        speed = list(csv.reader(file))
    with (ROOT / "docs/runtimes/agreement.csv").open() as file:
        measured = list(csv.DictReader(file))
    tables = runpy.run_path(str(ROOT / "benchmarks/runtimes.py"))["agreement_tables"](measured)
    for table in (speed, *tables):
        assert markdown(table) in (ROOT / "docs/runtimes.md").read_text()


@pytest.mark.parametrize("name", ["filters", "prepare"])
def test_the_data_tables(name: str) -> None:
    with (ROOT / f"docs/experiments/{name}.csv").open() as file:
        rows = list(csv.reader(file))
    assert markdown(rows) in (ROOT / "docs/data.md").read_text()


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("runtimes/transformers", "runtimes"),
        ("runtimes/machine", "runtimes"),
        ("runtimes/experts", "runtimes"),
        ("experiments/streaming", "experiments"),
        ("experiments/calibrated", "experiments"),
        ("training/output-loss", "objective"),
        ("performance/expert-layers", "performance"),
        ("performance/expert-rows", "performance"),
        ("performance/step-overhead", "performance"),
        ("performance/memory", "performance"),
        ("performance/training-speed", "performance"),
        ("performance/training-speed-gpu", "performance"),
        ("tuning/tuning", "tuning"),
    ],
)
def test_the_measured_tables(name: str, page: str) -> None:
    with (ROOT / f"docs/{name}.csv").open() as file:
        rows = list(csv.reader(file))
    assert markdown(rows) in (ROOT / f"docs/{page}.md").read_text()


@pytest.mark.parametrize("name", ["stories260k", "smollm2-135m", "smollm2-135m-h200"])
def test_the_distillation_tables(name: str) -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/publish_distillation.py"))
    curves = parts["_read"](ROOT / f"docs/training/distillation-{name}.csv")
    table = markdown(parts["result_rows"](curves))
    assert f"<!-- distillation-{name} -->\n{table}" in (ROOT / "docs/objective.md").read_text()


def test_the_benchmarks_table() -> None:
    rows = runpy.run_path(str(ROOT / "benchmarks/suite.py"))["benchmark_rows"]()
    assert markdown(rows) in (ROOT / "docs/evaluation.md").read_text()


def test_the_studies_and_the_grid_of_plan() -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/publish_study.py"))
    studies = parts["studies_in"](ROOT / "docs/study")
    for folder in studies:
        assert page(folder) == (folder / "study.md").read_text()
    assert parts["overview"](studies, ROOT / "docs") == (ROOT / "docs/study.md").read_text()
    assert read_grid(parts["grid_of"](studies)) == read_grid()
