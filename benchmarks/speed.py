"""What `moefy bench` measured of shapes: docs/speed.md.

    moefy bench llama-1b --json > llama-1b.json    # on a quiet machine
    python benchmarks/speed.py llama-1b.json …     # into docs/speed/, and the page
    python benchmarks/speed.py                     # the page again

The page also has the speeds that benchmarks/frontier.py measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from publish import rows_of
from runtimes import read_csv

from moefy.report.tables import Rows, markdown, write_csv

DOCS = Path(__file__).parents[1] / "docs"
RATIOS = ("prefill / dense", "decode / dense")
Record = dict[str, str]
HEAD = """# How fast a split is

Written by `python benchmarks/speed.py` from docs/speed/ and docs/construction/frontier-speed.csv.
Tokens per second over the dense parent's at the same shape, random weights, one sequence; medians
of ratios within a round. `moefy bench SHAPE` measures any shape on your machine before anything is
converted, and `moefy plan MODEL --speedup 1.4` reads the figures of the frontier.

"""


def measured(file: Path) -> list[Record]:
    """Return a row for each model in a file that `moefy bench --json` wrote."""
    found, rows = json.loads(file.read_text()), dict[tuple[str, str, int], Record]()
    place = found["device"] if found["device"] != "cpu" else f"{found['threads']} CPU threads"
    for speed in found["speeds"]:
        runtime = f"{speed['runtime']}, {speed['dtype']}"
        about = {"shape": file.stem, "runtime": runtime, "model": speed["model"]}
        key = (runtime, speed["model"], speed["batch"])
        row = rows.setdefault(key, about | {"batch": str(speed["batch"])})
        row[f"{speed['phase']} tok/s"] = f"{speed['tokens_per_s']:.1f}"
        row[f"{speed['phase']} / dense"] = f"{speed['of_dense']:.2f}"
    scaled = f"; {found['layers']} layers, scaled" if found["layers"] else ""
    return [row | {"measured on": f"{place}{scaled}"} for row in rows.values()]


def of_frontier(row: Record) -> Record:
    return {
        "shape": row["shape"],
        "runtime": "llama.cpp, q8_0",
        "model": row["design"].replace(" of ", "/"),
        **{f"{phase} / dense": row[f"{phase} speed / dense"] for phase in ("prefill", "decode")},
        "measured on": row["measured in"].rpartition("Q8_0, ")[2],
    }


def verdict(row: Record) -> str:
    """Say where a split is faster by more than 5%."""
    faster = [name.split()[0] for name in RATIOS if float(row[name]) > 1.05]
    return {0: "not faster", 2: "faster"}.get(len(faster), f"{''.join(faster)} alone")


def glance(records: list[Record]) -> Rows:
    """Return the first table: every split that was measured, the fastest to decode first."""
    splits = [row for row in records if row["model"][0].isdigit() and row.get("batch", "1") == "1"]
    splits.sort(key=lambda row: -float(row["decode / dense"]))
    keys = ("shape", "runtime", "model", *RATIOS, "measured on")
    return rows_of([{key: row[key] for key in keys} | {"": verdict(row)} for row in splits])


def page() -> str:
    frontier = read_csv(DOCS / "construction/frontier-speed.csv")
    files = sorted((DOCS / "speed").glob("*.csv"))
    records = [row for file in files for row in read_csv(file)] + [*map(of_frontier, frontier)]
    text = HEAD + markdown(glance(records))
    slow = [row for row in records if row["model"][0].isdigit() and verdict(row) == "not faster"]
    listed = "; ".join(f"{row['model']} at {row['shape']} in {row['runtime']}" for row in slow)
    text += "\nDo not convert for speed if prefill matters and the table says *decode alone*, or\n"
    text += f"if it says *not faster*: {listed or 'no row does'}.\n"
    for file in files:
        text += f"\n## {file.stem}\n\n{markdown(rows_of(read_csv(file)))}"
    return text


def main(files: list[Path]) -> None:
    (DOCS / "speed").mkdir(exist_ok=True)
    for file in files:
        write_csv(DOCS / "speed" / f"{file.stem}.csv", rows_of(measured(file)))
    (DOCS / "speed.md").write_text(page())


if __name__ == "__main__":
    main([*map(Path, sys.argv[1:])])
