"""Runs commands on changed inputs, and judges how they end.

A module of this folder that has `COMMANDS` is one part of the fuzzer:

    COMMANDS = {"config.json": "convert dense out --experts 4 --active 2"}

    def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
        # `folder` is as `make_place` of tests/conftest.py writes it, and again before each change
        yield "config.json: byte 7 is 0xff", lambda: ...

    def agrees(folder: Path, label: str) -> str | None:    # optional
        # runs after a success, in the process that ran the command; says what is wrong with it

    KNOWN = {"config.json: byte 7": "why it is not mended"}    # optional
    # how the labels of wrong ends begin that are counted apart; docs/reliability.md names them

The part of the label before the colon is the kind, and `COMMANDS` holds the words behind `moefy`
for each kind; they run in `folder`. What is random is drawn from a generator with a fixed seed.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import fuzz
from tests.kills import End, Server

CPU_S = 60  # of the processor, because a machine may be busy
LIMITS = {"seconds": 10 * CPU_S, "RLIMIT_CPU": CPU_S, "RLIMIT_DATA": 4 << 30, "RLIMIT_CORE": 0}
LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Outcome:
    """How one case ended: "success", "refused", "known" or "wrong", and what was said."""

    kind: str
    label: str
    end: str
    said: str
    cpu_s: float
    peak_bytes: int


def modules() -> list[str]:
    """Return the names of the parts of the fuzzer."""
    names = [each.name for each in pkgutil.iter_modules(fuzz.__path__)]
    inner = [f"tests.fuzz.{name}" for name in names if name not in ("runner", "__main__")]
    return [name for name in inner if hasattr(importlib.import_module(name), "COMMANDS")]


def run(
    module_name: str,
    place: Path,
    server: Server,
    *,
    only: str = "",
    every: int = 1,
    first: int = 0,
) -> Iterator[Outcome]:
    """Try the mutations of one module.

    Args:
        module_name: see `modules`.
        place: folder that `make_place` wrote; another folder is made beside it.
        server: runs the commands.
        only: text that a label must hold.
        every: try only each so-manieth mutation.
        first: number of the first one that is tried.
    """
    module = importlib.import_module(module_name)
    folder = place.with_name("case") / "here"
    _renew(folder, place)
    for number, (label, change) in enumerate(module.mutations(folder)):
        if only not in label or number % every != first:
            continue
        _renew(folder, place)
        change()
        before = hidden(folder)
        kind = label.partition(":")[0]
        command = module.COMMANDS[kind]
        end = server.run(folder, command, limits=LIMITS, check=(module_name, label))
        said = (folder.parent / "log").read_text(errors="replace")
        wrong = complaint(end, said, hidden(folder) - before)
        ended = "wrong" if wrong else "success" if end.code == 0 else "refused"
        if wrong and any(label.startswith(known) for known in getattr(module, "KNOWN", ())):
            ended = "known"
        last = said.strip().rpartition("\n")[2][:1000]
        said = f"{wrong}: {last}" if wrong else last
        yield Outcome(kind, label, ended, said, end.cpu_s, end.peak_bytes)


def _renew(folder: Path, place: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(place, folder)


def hidden(folder: Path) -> set[str]:
    """Return what a run has beside its output, by name."""
    return {file.name for file in (*folder.glob(".*.lock"), *folder.rglob(".*.partial-*"))}


def complaint(end: End, said: str, left: set[str]) -> str:
    """Say what is wrong with an end that left hidden files; nothing where it is allowed."""
    lines = said.strip().splitlines()
    if end.code < 0:
        return f"ended by signal {-end.code} after {end.elapsed_s:.0f} s"
    if "Traceback (most recent call last)" in said or "this is a bug" in said:
        return "not an error of ours"
    if end.cpu_s > CPU_S or end.peak_bytes > LIMITS["RLIMIT_DATA"]:
        return f"{end.cpu_s:.0f} s, {end.peak_bytes / 2**30:.1f} GiB"
    if end.code not in (0, 1, 2):
        return f"exit code {end.code}"
    if end.code == 0:
        return end.note or ""
    if not lines or not lines[-1].startswith("moefy: "):
        return "the last line is no message of ours"
    if sum(line.startswith("moefy: ") for line in lines) > 1:
        return "more than one line"
    if len(lines[-1]) > LONGEST_MESSAGE:
        return f"a message of {len(lines[-1])} characters"
    return f"{min(left)} is left behind" if left else ""


def counts(outcomes: list[Outcome]) -> list[list[str]]:
    """Return a table: kind of input, changed inputs, how many of them ended how."""
    tally = Counter((each.kind, each.end) for each in outcomes)
    ends = ("success", "refused", "known", "wrong")
    rows = [
        [kind, *(str(tally[kind, end]) for end in ends)]
        for kind in dict.fromkeys(each.kind for each in outcomes)
    ]
    return [["kind", *ends], *rows]


def costs(outcomes: list[Outcome]) -> Iterator[str]:
    """Say of each kind how much the costliest input took."""
    for kind in dict.fromkeys(each.kind for each in outcomes):
        mine = [each for each in outcomes if each.kind == kind]
        slowest, most = max(each.cpu_s for each in mine), max(each.peak_bytes for each in mine)
        yield f"{kind}: at most {slowest:.1f} s, {most / 2**30:.1f} GiB"
