"""How long-running functions say where they are, without printing.

A stage calls `report(Progress(...))`; the command line draws bars from it, a notebook may do
something else, and the default does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One sign of life.

    Attributes:
        stage: what is being done, in the words a user knows ("convert", "train").
        done: units finished so far.
        total: units in all.
        note: a few words on the current state ("loss 5.31"), possibly empty.
    """

    stage: str
    done: int
    total: int
    note: str = ""


ProgressFn = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress; the default of every function."""
