"""Writes the dry run of the paper's recipe into docs/training.md.

python benchmarks/publish_training.py
"""

from __future__ import annotations

import re
from pathlib import Path

from moefy.report.tables import dry_run_rows, markdown
from moefy.training.dry_run import dry_run

ROOT = Path(__file__).resolve().parent.parent
MODEL, RECIPE, PROCESSES = "llama-2-7b:4/16", "recipes/llama-moe-7b-train.yaml", 112


def block() -> str:
    """Return the command and its table, between the page's marks."""
    found = dry_run(MODEL, processes=PROCESSES, recipe=ROOT / RECIPE)
    command = f"moefy train {MODEL} OUT --recipe {RECIPE} --dry-run {PROCESSES}"
    return (
        f"<!-- dry-run -->\n```bash\n{command}\n```\n\n{markdown(dry_run_rows(found))}"
        "<!-- /dry-run -->"
    )


def main() -> None:
    page = ROOT / "docs/training.md"
    found = block()
    text, count = re.subn(
        "<!-- dry-run -->\n.*?<!-- /dry-run -->",
        lambda _: found,
        page.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1
    page.write_text(text)


if __name__ == "__main__":
    main()
