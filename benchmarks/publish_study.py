"""Put what `moefy study` wrote into docs/study.md and docs/study/, and the grid into the package.

    moefy study OUT --data ../shared/data/pretrain --sft ../shared/data/sft/sharegpt-6k.jsonl.gz
    python benchmarks/publish_study.py OUT

The page is made from the copied files alone; `moefy plan` reads the grid.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from moefy.studies.grid import GRID
from moefy.studies.report import page

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("*.csv", "*.png", "about.md", "recipe.yaml", "runs.jsonl")


def publish(out: Path, docs: Path, package: Path) -> None:
    place = docs / "study"
    place.mkdir(parents=True, exist_ok=True)
    for file in sorted(file for kind in KINDS for file in out.glob(kind)):
        shutil.copyfile(file, place / file.name)
    (docs / "study.md").write_text(page(place, links="study/"))
    if (place / GRID).is_file():
        shutil.copyfile(place / GRID, package / GRID)


if __name__ == "__main__":
    publish(Path(sys.argv[1]), ROOT / "docs", ROOT / "src/moefy/studies")
