"""Imports point down, and import-linter sees it when one does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("", "Contracts: 1 kept, 0 broken."),
        (
            "from moefy.training.run import train\n",
            "moefy.checkpoint is not allowed to import moefy.training",
        ),
        (
            "def late():\n    import moefy.report.tables\n",
            "moefy.checkpoint is not allowed to import moefy.report",
        ),
    ],
    ids=["as it is", "at the top", "inside a function"],
)
def test_an_upward_import_breaks_the_contract(tmp_path: Path, added: str, says: str) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    with (tmp_path / "src/moefy/checkpoint/cost.py").open("a") as file:
        file.write(added)
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(linter), "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert says in done.stdout, done.stdout + done.stderr
    assert done.returncode == bool(added)
