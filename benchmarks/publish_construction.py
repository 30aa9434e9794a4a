"""Put the ablation of methods of studies into docs/construction/ and docs/construction.md.

    moefy study OUT --only methods --set experts=64 --set active=32 ...
    python benchmarks/publish_construction.py OUT...    # of each active size one; others stay

Rows of methods that no study has were measured by an earlier version (docs/construction.md).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from publish import replace_table, rows_of

from moefy.report.tables import write_csv
from moefy.studies.recipe import StudyRecipe
from moefy.studies.report import arms_in, difference

DOCS = Path(__file__).parents[1] / "docs"
TABLES = {
    "heldout": DOCS / "construction/leaderboard.csv",
    "prototype": DOCS / "experiments/prototype/leaderboard.csv",
}


def main(folders: list[Path]) -> None:
    with TABLES["heldout"].open() as lines:
        rows = list(csv.DictReader(lines))
    for folder in folders:
        recipe = StudyRecipe.build(folder / "recipe.yaml")
        split = {"experts": str(recipe.experts), "active": str(recipe.active)}
        arms = arms_in(folder)["methods"]
        for name, runs in arms.items():
            above = difference(runs, arms["dense"])
            if above is not None:
                new = dict.fromkeys(rows[0], "") | split | {"method": name}
                new["nats_above_dense"] = str(above.mean)
                same = [row for row in rows if all(row[k] == new[k] for k in ("method", *split))]
                rows = [row for row in rows if row not in same] + [new]
    write_csv(TABLES["heldout"], rows_of(rows))
    for mark, file in TABLES.items():
        replace_table(DOCS / "construction.md", mark, nats_rows(file))


def nats_rows(file: Path) -> list[list[str]]:
    """Return nats above dense, a row per method and a column per share of the FFN."""
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["experts"] != "1"]
    shares = {row["method"]: {} for row in rows}
    for row in rows:
        share = int(row["active"]) / int(row["experts"])
        shares[row["method"]][share] = f"{float(row['nats_above_dense']):.3f}"
    columns = sorted({share for found in shares.values() for share in found}, reverse=True)
    header = ["nats above dense", *(f"{share:.0%} of the FFN" for share in columns)]
    body = [
        [method, *(shares[method].get(share, "") for share in columns)]
        for method in sorted(shares, key=lambda method: float(shares[method].get(0.5, -1)))
    ]
    return [header, *body]


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
