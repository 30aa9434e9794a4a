"""What a command shows: bars on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from moefy.progress import Progress, ProgressFn


@contextmanager
def bars() -> Iterator[ProgressFn]:
    """Draw one bar per stage on a terminal, print a line now and then into a log.

    Both go to standard error, so that output stays clean.
    """
    quiet_libraries()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield log_lines()
        return

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, Any] = {}
    with Bars(
        *columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console
    ) as bars:

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, note="")
            bars.update(
                tasks[progress.stage],
                total=progress.total,
                completed=progress.done,
                note=progress.note,
            )

        yield report


def log_lines(every_s: float = 10.0) -> ProgressFn:
    """Return a reporter that prints a line when a stage ends, and every ten seconds between."""
    last_s = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last_s
        finished = progress.done >= progress.total
        now_s = time.monotonic()
        if finished or now_s - last_s >= every_s:
            note = f"  {progress.note}" if progress.note else ""
            count = f"{progress.done:,}/{progress.total:,}"
            print(f"{progress.stage} {count}{note}", file=sys.stderr, flush=True)
            last_s = now_s

    return report


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of ours; their errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2, default=str))


def print_table(rows: list[list[str]], title: str) -> None:
    """Print header and rows, wide enough to be read in a log too."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    if console.width < 100 and not console.is_terminal:
        console = Console(width=160)
    console.print(table)
