"""The wheel and the sdist hold what moefy needs, and run beside the installed libraries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.conftest import write_tiny_llama

import moefy

ROOT = Path(__file__).parents[2]
CHOICES = ("--experts", "4", "--active", "2", "--effort", "fast", "--data", "text")
NEEDED = {
    "recipes/llama-moe.yaml",
    "checkpoint/families.yaml",
    "checkpoint/card.md.j2",
    "report/report.html.j2",
    "studies/speed.csv",
    "py.typed",
}


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> str:
    given = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=given | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def brought_by(*names: str) -> set[str]:
    """Return the installed packages that packages need without their extras, and these packages."""
    found: set[str] = set()
    wanted = [(canonicalize_name(name), {""}) for name in names]
    while wanted:
        name, extras = wanted.pop()
        found.add(name)
        for text in distribution(name).requires or ():
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
                below = (canonicalize_name(need.name), need.extras or {""})
                wanted += [below] if below[0] not in found else []
    return found


def test_the_page_lists_what_is_installed_and_it_is_little() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^\| (.*?) \|", page.partition("## What moefy needs")[2], re.MULTILINE)
    table = listed[2 : listed.index("backports.zstd") + 1]
    needs = [Requirement(text) for text in distribution("moefy").requires or ()]
    own = {canonicalize_name(need.name) for need in needs if "extra" not in str(need.marker)}
    assert {canonicalize_name(name) for row in table for name in row.split(", ")} == own
    assert len(brought_by(*own) - brought_by("torch", "transformers")) <= 20


@pytest.mark.slow
def test_the_wheel_of_the_sdist_runs(tmp_path: Path) -> None:
    # not `pip wheel`, which makes no sdist: the backend that pyproject.toml names makes both
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "install", "--target", tmp_path / "backend", "hatchling")
    build = (sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "dist", "-t")
    run(*build, "sdist", PYTHONPATH=str(tmp_path / "backend"))
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    run(*build, "wheel", folder=source, PYTHONPATH=str(tmp_path / "backend"))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name == f"moefy-{moefy.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1 << 20
    assert sdist.stat().st_size < 1 << 20
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("moefy/") for name in archive.namelist()}
    assert held >= NEEDED
    package = ROOT / "src/moefy"
    files = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    assert held >= {file for file in files if "__pycache__" not in file}

    # an environment that has what pip would install beside the wheel, and nothing else
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (place,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for name in brought_by("moefy") - {"moefy"}:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (place / top).exists():
                (place / top).symlink_to(package.locate_file(top))
    python = tmp_path / "venv/bin/python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    command = tmp_path / "venv/bin/moefy"
    assert run(command, "--version", folder=tmp_path) == f"moefy {moefy.__version__}\n"
    assert "llama-moe-7b-train" in run(command, "recipes", folder=tmp_path)
    assert "6.74B" in run(command, "inspect", "llama-2-7b", folder=tmp_path)
    where = run(python, "-c", "import moefy; print(moefy.__file__)", folder=tmp_path)
    assert where.startswith(str(place))

    write_tiny_llama(tmp_path / "dense")
    (tmp_path / "text").mkdir()
    lines = (json.dumps({"text": f"some words {i} " * 60}) + "\n" for i in range(200))
    (tmp_path / "text/notes.jsonl").write_text("".join(lines))
    run(command, "convert", "dense", "moe", *CHOICES, folder=tmp_path)
    lengths = ("--tokens", "256", "--sequence-length", "128", "--data", "text")
    run(command, "train", "moe", "trained", "--teacher", "dense", *lengths, folder=tmp_path)
    assert "perplexity" in run(
        command, "eval", "dense", "trained", "--data", "text", folder=tmp_path
    )
