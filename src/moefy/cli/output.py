"""What a command shows: bars on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.table import Table

from moefy.progress import Progress, ProgressFn

Result = TypeVar("Result")

_UNLIMITED = 10_000  # columns
_MAIN = (
    *("meets target", "model", "phase", "tok/s", "/ dense", "KL to dense", "loss above"),
    *("perplexity", "decode tok/s", "active", "prefill tok/s", "decode", "prefill"),
    "nats above dense",
)
"""Columns that a narrow terminal keeps as long as it can."""
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
    then: str | Sequence[Sequence[object]] = (),
) -> None:
    """Print a result: as JSON for programs, or as tables, a text and the next command for people.

    `as_json` is None for a command that has no `--json`. `then` are commands of moefy, each as its
    words, which must run as they are printed; or a sentence.
    """
    if as_json:
        if is_dataclass(record) and not isinstance(record, type):
            record = asdict(record)
        print(json.dumps(record, indent=2, default=str))  # default: paths become text
        return
    for rows, title in tables:
        _print_table(rows, title, "" if as_json is None else ", or --json,")
    if text:
        print(fitted(text, sys.stdout))
    if not isinstance(then, str):  # the second command stands below the first
        then = f"\n{'':11}".join(f"moefy {shlex.join(map(str, words))}" for words in then)
    if then:
        print(f"What next: {then}")


def warn(*lines: str) -> None:
    """Print lines on standard error, so that JSON stays JSON."""
    for line in lines:
        print(fitted(line, sys.stderr), file=sys.stderr)


def fitted(text: str, stream: TextIO) -> str:
    """Return a text for a terminal, which would break words; elsewhere lines stay as they are."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, width, **how) for line in text.splitlines())


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
    from rich.table import Column
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        """The time left; of a stage that is one step, the time so far or that it took."""

        def render(self, task: Task) -> Text:
            if task.total != 1:
                return super().render(task)
            took = task.elapsed if task.finished_time is None else task.finished_time
            return Text(
                f"{timedelta(seconds=round(took or 0))}{'' if task.finished else ' so far'}"
            )

    # long texts go on in the next line, because the end of a note is as important as its beginning
    name, note = (
        TextColumn(text, markup=False, table_column=Column(overflow="fold"))
        for text in ("{task.description}", "{task.fields[note]}")
    )
    tasks: dict[str, Any] = {}
    # a narrow terminal folds the texts, and cuts no count and no time
    whole = Column(no_wrap=True)
    bar = BarColumn(bar_width=min(40, max(8, console.width - 72)), table_column=whole)
    counts = MofNCompleteColumn(table_column=whole), TimeLeft(table_column=whole)
    # a step may take minutes, and the time left needs two of them
    with Bars(name, bar, *counts, note, console=console, speed_estimate_period=3600) as shown:

        def report(progress: Progress) -> None:
            state: dict[str, Any] = {"total": progress.total, "completed": progress.done}
            state["note"] = progress.note
            task, done = tasks.get(progress.stage, (None, 0))
            if task is None:  # a stage begins with its first sign of life
                task = shown.add_task(progress.stage, **state)
            elif progress.done < done:  # it came again, and its time begins again
                shown.reset(task, **state)
            shown.update(task, **state)
            tasks[progress.stage] = task, progress.done

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
