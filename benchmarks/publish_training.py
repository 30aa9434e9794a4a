"""Writes the dry run of the paper's recipe into docs/training.md.

python benchmarks/publish_training.py
"""

from __future__ import annotations

from pathlib import Path

from publish import replace_table

from moefy.report.tables import dry_run_rows
from moefy.training.dry_run import dry_run

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    recipe = ROOT / "recipes/llama-moe-7b-train.yaml"
    found = dry_run("llama-2-7b:4/16", processes=112, recipe=recipe)
    replace_table(ROOT / "docs/training.md", "dry-run", dry_run_rows(found))


if __name__ == "__main__":
    main()
