"""`moefy study --smoke` runs every ablation, and `moefy plan` reads what it measured."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from moefy.report.tables import markdown
from moefy.storage import cache_folder
from moefy.studies.ablations import ABLATIONS
from moefy.studies.recipe import StudyRecipe
from moefy.studies.runs import read_arms
from moefy.studies.summary import summary_rows
from moefy.studies.toy import SMOKE

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


@pytest.mark.timeout(2400)  # a minute and a half on two free cores
def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "study"
    printed = moefy("study", out, "--smoke")
    page, recipe = (out / "study.md").read_text(), StudyRecipe.build(**SMOKE)
    for ablation in ABLATIONS:
        arms = read_arms(out / f"{ablation.name}.csv")
        assert list(arms) == [arm.name for arm in ablation.arms(recipe)]
        assert all(len(runs) == recipe.seeds for runs in arms.values())
        assert markdown(summary_rows(arms)) in page
        assert ablation.name in map(str.strip, printed.splitlines())
        assert (out / f"{ablation.name}.png").stat().st_size > 10_000
    with (out / "grid.csv").open() as file:
        grid = list(csv.DictReader(file))
    assert len(grid) == len(read_arms(out / "size.csv")) - 1
    assert all(float(row["decode_of_dense"]) > 0 for row in grid)
    tuned = read_arms(out / "tuning.csv")
    assert all(runs[0].loss < runs[0].loss_before for runs in tuned.values())
    assert not (out / "work").exists()

    again = json.loads(moefy("study", out, "--smoke", "--json"))
    assert again["measured"] == 0
    assert again["skipped"] == {}

    toy = cache_folder() / "toys/model/trained"
    found = json.loads(moefy("plan", toy, "--active-params", "30K", "--study", out, "--json"))
    assert found["recommended"]["cost"]["active_params"] <= 30_000
    table = moefy("plan", toy, "--speedup", "0.01", "--study", out)
    assert table.count("recommended") == 1
    assert "What next: moefy convert" in table

    publish = runpy.run_path(str(ROOT / "benchmarks/publish_study.py"))["publish"]
    (docs := tmp_path / "docs").mkdir()
    publish([out], docs, docs)
    assert (docs / "grid.csv").read_bytes() == (out / "grid.csv").read_bytes()
    folder = docs / f"study/{recipe.tokens}-tokens"
    assert f"({folder.relative_to(docs)}/rescaling.png)" in (docs / "study.md").read_text()
    assert (folder / "rescaling.png").is_file()
    # what is published is a study, which goes on
    assert json.loads(moefy("study", folder, "--smoke", "--json"))["measured"] == 0


def test_an_option_given_twice_adds_up(tmp_path: Path) -> None:
    words = ["study", tmp_path / "study", "--smoke", "--only", "magic", "--only", "size"]
    command = [sys.executable, "-m", "moefy", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no ablation 'magic'" in done.stderr
