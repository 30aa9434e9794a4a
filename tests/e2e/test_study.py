"""`moefy study --smoke` runs every ablation, and `moefy plan` reads what it measured."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from moefy.studies.outcome import read_outcome

from moefy.report.tables import markdown
from moefy.studies.ablations import ABLATIONS
from moefy.studies.report import conclusion_of, outcome_rows
from moefy.studies.toy import smoke_recipe

ROOT = Path(__file__).parents[2]


def moefy(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "moefy", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(2400)  # two minutes on two free cores
def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "study"
    printed = moefy("study", out, "--smoke")
    page, recipe = (out / "study.md").read_text(), smoke_recipe()
    for ablation in ABLATIONS:
        arms = read_outcome(out / f"{ablation.name}.csv")
        assert list(arms) == [arm.name for arm in ablation.arms(recipe)]
        assert all(len(arm.after) == recipe.seeds for arm in arms.values())
        assert markdown(outcome_rows(arms)) in page
        assert conclusion_of(out, ablation.name) in page
        assert f"{ablation.name}: {conclusion_of(out, ablation.name)}" in printed
        assert (out / f"{ablation.name}.png").stat().st_size > 10_000
    with (out / "grid.csv").open() as file:
        grid = list(csv.DictReader(file))
    assert len(grid) == len(list(read_outcome(out / "size.csv"))) - 1
    assert all(float(row["decode_of_dense"]) > 0 for row in grid)
    tuned = read_outcome(out / "tuning.csv")
    assert all(arm.after[0] < arm.before[0] for arm in tuned.values())
    assert not list((out / "work").glob("*/*"))

    again = json.loads(moefy("study", out, "--smoke", "--json"))
    assert again["measured"] == 0
    assert again["skipped"] == {}

    found = json.loads(
        moefy("plan", out / "toys/model", "--active-params", "30K", "--study", out, "--json")
    )
    assert found["recommended"]["cost"]["active_params"] <= 30_000
    table = moefy("plan", out / "toys/model", "--speedup", "0.01", "--study", out)
    assert table.count("recommended") == 1
    assert "What next: moefy convert" in table

    publish = runpy.run_path(str(ROOT / "benchmarks/publish_study.py"))["publish"]
    (docs := tmp_path / "docs").mkdir()
    publish([out], docs, docs)
    assert (docs / "grid.csv").read_bytes() == (out / "grid.csv").read_bytes()
    figure = f"study/{recipe.tokens}-tokens/rescaling.png"
    assert f"({figure})" in (docs / "study.md").read_text()
    assert (docs / figure).is_file()


def test_an_option_given_twice_adds_up(tmp_path: Path) -> None:
    words = ["study", tmp_path / "study", "--smoke", "--only", "magic", "--only", "size"]
    command = [sys.executable, "-m", "moefy", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no ablation 'magic'" in done.stderr
