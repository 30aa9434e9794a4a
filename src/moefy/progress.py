"""How long-running functions say where they are, without printing.

A stage calls `report(Progress(...))`; the command line draws bars from it, a notebook may do
something else, and the default does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One sign of life."""

    stage: str  # what is being done, in words that a user knows: "convert", "train"
    done: int  # units finished so far
    total: int  # units in all
    note: str = ""  # a few words on the current state: "loss 5.31"


ProgressFn = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress; the default of every function."""
