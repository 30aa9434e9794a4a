"""`python -m tests.fuzz [MODULE …] [--only TEXT] [--every N] [--first N]`: try changed inputs.

`--write` puts the counts into docs/reliability/fuzz.csv and docs/reliability.md.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

from moefy.report.tables import markdown
from tests.conftest import make_place
from tests.fuzz.runner import Outcome, costs, counts, modules, run
from tests.kills import Server

FIGURES = Path(__file__).parents[2] / "docs/reliability/fuzz.csv"
_WRITE_EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="print every end")
    asked = parser.parse_args()
    names = [
        name for name in modules() if not asked.modules or name.split(".")[-1] in asked.modules
    ]
    outcomes: list[Outcome] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place, server = make_place(Path(folder) / "place"), Server()
        for name in names:
            for outcome in run(
                name, place, server, only=asked.only, every=asked.every, first=asked.first
            ):
                outcomes.append(outcome)
                if asked.verbose or outcome.end == "wrong":
                    print(f"{outcome.end}: {outcome.label}\n    {outcome.said}", flush=True)
                if asked.write and len(outcomes) % _WRITE_EVERY == 0:  # it may be killed
                    write_figures(FIGURES, counts(outcomes))
            print(f"{name}: {len(outcomes)} inputs, {time.monotonic() - started:.0f} s", flush=True)
            if asked.write and outcomes:
                write_figures(FIGURES, counts(outcomes))
        server.close()
    print(*map(",".join, counts(outcomes)), *costs(outcomes), sep="\n")


def write_figures(figures: Path, table: list[list[str]], *, summed: bool = True) -> None:
    """Put rows into a CSV file, each in the place of an earlier one of its name, and into the page.

    The last row is the sum where there shall be one.
    """
    figures.parent.mkdir(exist_ok=True)
    rows: dict[str, list[str]] = {}
    if figures.is_file():
        with figures.open() as file:
            rows = {row[0]: row for row in csv.reader(file)}
    rows |= {row[0]: row for row in table}
    rows.pop("all", None)
    header, *others = rows.values()
    whole = [header, *others]
    if summed:
        sums = [str(sum(int(row[i]) for row in others)) for i in range(1, len(header))]
        whole.append(["all", *sums])
    with figures.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(whole)
    page = figures.parents[1] / "reliability.md"
    marks = f"<!-- {figures.stem} -->\n", f"<!-- /{figures.stem} -->"
    before, _, after = page.read_text().partition(marks[0])
    page.write_text(before + marks[0] + markdown(whole) + marks[1] + after.partition(marks[1])[2])


if __name__ == "__main__":
    main()
