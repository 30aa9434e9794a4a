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

_UNLIMITED = 10_000  # columns
_MAIN = (
    *("", "model", "phase", "tok/s", "/ dense", "KL to dense", "loss above", "active"),
    *("decode tok/s", "perplexity", "prefill tok/s", "decode", "prefill", "nats above dense"),
)
"""Columns that a narrow terminal keeps as long as it can; "" marks rows."""
_MINOR = {"items": 1, "metric": 2, "shots": 3}
"""Columns that it leaves out before all others."""


def call(verb: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a verb of `moefy` and show its progress."""
    with bars() as report:
        return verb(*arguments, report=report, **options)


def show(
    record: Any,
    *tables: tuple[list[list[str]], str],
    as_json: bool | None = None,
    text: str = "",
    then: str = "",
) -> None:
    """Print a result: as JSON for programs, or as tables, a text and the next command for people.

    `as_json` is None for a command that has no `--json`.
    """
    if as_json:
        if is_dataclass(record) and not isinstance(record, type):
            record = asdict(record)
        print(json.dumps(record, indent=2, default=str))  # default: paths become text
        return
    for rows, title in tables:
        _print_table(rows, title, "" if as_json is None else ", or --json,")
    if text:
        print(text)
    if then:
        print(f"What next: {then}")


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

    from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        """The time left; of a stage that is one step, the time so far."""

        def render(self, task: Task) -> Text:
            so_far = f"{timedelta(seconds=round(task.elapsed or 0))} so far"
            return Text(so_far) if task.total == 1 else super().render(task)

    name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    tasks: dict[str, Any] = {}
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeLeft(), note)
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


def _print_table(rows: list[list[str]], title: str, elsewhere: str) -> None:
    # a cell or a title is text of others, in which [b] is no markup
    console = Console(markup=False, emoji=False)
    if not (console.is_terminal or "COLUMNS" in os.environ):
        console.width = _UNLIMITED  # a log has no width of its own
    # the first column says what a row is; among the others the most important come first
    first, *others = range(len(rows[0]))
    kept = [first]
    for column in sorted(others, key=lambda column: _rank(rows[0][column])):
        if len(kept) > 1 and _width(rows, [*kept, column], console.width) > console.width:
            break
        kept.append(column)
    console.print(title, style="italic", highlight=False)
    console.print(_table(rows, sorted(kept), console.width))
    if left_out := ", ".join(rows[0][column] for column in others if column not in kept):
        whole = _width(rows, [first, *others], _UNLIMITED)
        shown_by = f"a terminal of {whole} columns{elsewhere} shows all"
        console.print(f"Left out: {left_out} ({shown_by})", highlight=False)


def _rank(name: str) -> int:
    """Return a column's place in the order in which columns are left out, the last one first."""
    return _MINOR.get(name, _MAIN.index(name) - len(_MAIN) if name in _MAIN else 0)


def _width(rows: list[list[str]], columns: list[int], width: int) -> int:
    console = Console(width=_UNLIMITED, markup=False, emoji=False)
    return console.measure(_table(rows, columns, width)).maximum


def _table(rows: list[list[str]], columns: list[int], width: int) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        # long names of models are folded, and no cell is cut
        most = None if number else max(width // 4, len(rows[0][column]))
        justify: Any = "right" if number else "left"
        table.add_column(rows[0][column], justify=justify, overflow="fold", max_width=most)
    for row in rows[1:]:
        table.add_row(*(row[column] for column in columns))
    return table
