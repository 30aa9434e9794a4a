"""Measured tables on the pages of docs/, between the marks of their names."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from moefy.report.tables import Rows, markdown, write_csv


def read_csv(file: Path) -> list[dict[str, str]]:
    """Return the rows of a measured table, none where there is no file yet."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def rows_of(records: Sequence[Mapping[str, str]]) -> Rows:
    """Return header and rows of records that all have the same keys."""
    return [list(records[0]), *(list(record.values()) for record in records)]


def publish_table(rows: Rows, file: Path, page: Path) -> None:
    """Write measured rows as a CSV file, and on a page between the marks of that file's name."""
    write_csv(file, rows)
    replace_table(page, file.stem, rows)


def replace_table(page: Path, mark: str, rows: Rows) -> None:
    """Put a table on a page, as `replace_block` does."""
    replace_block(page, mark, markdown(rows))


def replace_block(page: Path, mark: str, content: str) -> None:
    """Put lines between `<!-- mark -->` and `<!-- /mark -->` on a Markdown page.

    Raises:
        ValueError: The page does not have such marks exactly once.
    """
    block = f"<!-- {mark} -->\n{content}<!-- /{mark} -->"
    pattern = f"<!-- {mark} -->\n.*?<!-- /{mark} -->"
    text, count = re.subn(pattern, lambda _: block, page.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page} has {count} places for {mark!r}")
    page.write_text(text)
