"""What a command shows: bars on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from moefy.progress import Progress, ProgressFn

Result = TypeVar("Result")


def call(verb: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a verb of `moefy` and show its progress."""
    with bars() as report:
        return verb(*arguments, report=report, **options)


def show(
    record: Any, *tables: tuple[list[list[str]], str], as_json: bool = False, text: str = ""
) -> None:
    """Print a result: as JSON for programs, or as tables and a text for people."""
    if as_json:
        if is_dataclass(record) and not isinstance(record, type):
            record = asdict(record)
        print(json.dumps(record, indent=2, default=str))  # default: paths become text
        return
    for rows, title in tables:
        _print_table(rows, title)
    if text:
        print(text)


def warn(*lines: str) -> None:
    """Print lines on standard error, so that JSON stays JSON."""
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def bars() -> Iterator[ProgressFn]:
    """Draw one bar per stage on a terminal, and print a line now and then into a log.

    Both go to standard error, so that output stays clean.
    """
    quiet_libraries()
    console = Console(stderr=True)
    # moving bars in a log would be a line for every step
    if not console.is_terminal:
        yield log_lines()
        return

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    tasks: dict[str, Any] = {}
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    with Bars(*columns, console=console) as shown:

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:  # a stage begins with its first sign of life
                tasks[progress.stage] = shown.add_task(progress.stage, note="")
            task = tasks[progress.stage]
            shown.update(task, total=progress.total, completed=progress.done, note=progress.note)

        yield report


def log_lines(every_s: float = 10.0) -> ProgressFn:
    """Return a reporter that prints a line when a stage ends, and every ten seconds between."""
    # by stage, one within another: when and where it began, when it was told, and where it is
    stages: dict[str, tuple[float, int, float, int]] = {}

    def report(progress: Progress) -> None:
        now, todo = time.monotonic(), progress.total - progress.done
        fresh = (now, progress.done, now, progress.done)
        stage = stages.get(progress.stage, fresh)
        if progress.done < stage[-1]:  # it came again
            stage = fresh
        start_s, start, told_s, _ = stage
        # the end of a stage is always told: a log then holds every stage, however short
        if todo <= 0 or now - told_s >= every_s:
            note = f"  {progress.note}" if progress.note else ""
            if todo > 0 and progress.done > start:
                left_s = round((now - start_s) * todo / (progress.done - start))
                note += f"  {timedelta(seconds=left_s)} left"
            count = f"{progress.done:,}/{progress.total:,}"
            print(f"{progress.stage} {count}{note}", file=sys.stderr, flush=True)
            told_s = now
        stages[progress.stage] = start_s, start, told_s, progress.done

    return report


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of ours; their errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _print_table(rows: list[list[str]], title: str) -> None:
    console = Console()
    # a log has no width of its own, and 80 columns would break the numbers
    if console.width < 100 and not console.is_terminal:
        console = Console(width=160)
    table = _table(rows, title)
    whole = console.measure(table, options=console.options.update_width(1000)).maximum
    if whole > console.width:  # a row for each column then
        table = _table([list(column) for column in zip(*rows, strict=True)], title)
    console.print(table)


def _table(rows: list[list[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
