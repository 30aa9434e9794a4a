"""Put the results of `moefy leaderboard` and of benchmarks/prototype.py into docs/construction.md.

    python benchmarks/publish_construction.py LEADERBOARD-OUT [PROTOTYPE-OUT]

Copies their files to docs/construction/ and docs/experiments/prototype/, and renews the tables.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

from publish import replace_table

DOCS = Path(__file__).parents[1] / "docs"
FILES = ("scores.jsonl", "leaderboard.csv", "leaderboard.md", "leaderboard.png")


def main(folders: list[Path]) -> None:
    places = {"heldout": DOCS / "construction", "prototype": DOCS / "experiments" / "prototype"}
    for source, place in zip(folders, places.values(), strict=False):
        place.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(source / name, place / name)
    for mark, place in places.items():
        replace_table(DOCS / "construction.md", mark, nats_rows(place / "leaderboard.csv"))


def nats_rows(file: Path) -> list[list[str]]:
    """Return nats above dense, a row per method and a column per share of the FFN."""
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["experts"] != "1"]
    shares = {row["method"]: {} for row in rows}
    for row in rows:
        share = int(row["active"]) / int(row["experts"])
        shares[row["method"]][share] = f"{float(row['nats_above_dense']):.3f}"
    columns = sorted({share for found in shares.values() for share in found}, reverse=True)

    def rank(method: str) -> tuple[float, float]:
        half = shares[method].get(0.5)
        return (float(half) if half else -1.0, 0.0)

    header = ["nats above dense", *(f"{share:.0%} of the FFN" for share in columns)]
    body = [
        [method, *(shares[method].get(share, "") for share in columns)]
        for method in sorted(shares, key=rank)
    ]
    return [header, *body]


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
