"""`moefy study` runs every ablation on a toy, and what it leaves can be published."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tests.toys import SMOKE, make_toys

from moefy.report.tables import markdown
from moefy.studies.ablations import ABLATIONS
from moefy.studies.recipe import StudyRecipe
from moefy.studies.report import arms_in, summary_rows

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
def test_every_ablation(tmp_path: Path) -> None:
    out, recipe = tmp_path / "study", StudyRecipe.build(**SMOKE)
    model, text = make_toys(tmp_path / "toys")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    toys = ["--model", model, "--data", text, "--recipe", tmp_path / "recipe.yaml"]
    printed = moefy("study", out, *toys)
    page = (out / "study.md").read_text()
    for ablation in ABLATIONS:
        arms = arms_in(out)[ablation.name]
        assert list(arms) == [arm.name for arm in ablation.arms(recipe)]
        assert all(len(runs) == recipe.seeds for runs in arms.values())
        assert markdown(summary_rows(arms)) in page
        assert ablation.name in map(str.strip, printed.splitlines())
        assert (out / f"{ablation.name}.png").stat().st_size > 10_000
    assert not (out / "work").exists()
    grid = (out / "grid.csv").read_text()
    assert len(grid.splitlines()) == len(arms_in(out)["size"])  # a header, and no dense model
    assert "At equal decode speed, " in page or "No pruned model was as fast as " in page

    again = json.loads(moefy("study", out, *toys, "--json"))
    assert again["measured"] == 0
    assert again["skipped"] == {}
    assert (out / "grid.csv").read_text() == grid  # no speed is measured again

    publish = runpy.run_path(str(ROOT / "benchmarks/publish_study.py"))["publish"]
    (docs := tmp_path / "docs").mkdir()
    publish([out], docs)
    folder = docs / f"study/{recipe.tokens}-tokens"
    assert f"({folder.relative_to(docs)}/rescaling.png)" in (docs / "study.md").read_text()
    assert (folder / "rescaling.png").is_file()
    # what is published is a study, which goes on
    assert json.loads(moefy("study", folder, *toys, "--json"))["measured"] == 0


def test_an_option_given_twice_adds_up(tmp_path: Path) -> None:
    words = ["study", tmp_path / "study", "--only", "magic", "--only", "size"]
    command = [sys.executable, "-m", "moefy", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no ablation 'magic'" in done.stderr


def test_a_plan() -> None:
    found = json.loads(moefy("plan", "smollm2-135m", "--active-params", "100M", "--json"))
    assert found["recommended"]["cost"]["active_params"] <= 100_000_000
    table = moefy("plan", "llama-2-7b", "--speedup", "1.4")
    assert table.count("recommended") == 1
    assert "of llama-3.2-1b" in table
    assert "What next: moefy convert MODEL" in table
