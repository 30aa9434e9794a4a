"""Put the curve of `convert --max-loss` into docs/construction/ and docs/construction.md.

moefy convert smollm2-135m OUT --max-loss 0.5 ...
python benchmarks/publish_search.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from publish import publish_table

from moefy.construct.convert import read_conversion
from moefy.storage import read_records
from moefy.studies.search import CURVE, Probe, Search, curve_rows

DOCS = Path(__file__).parents[1] / "docs"


def main(folder: Path) -> None:
    curve = sorted(read_records(folder / CURVE, Probe), key=lambda probe: probe.active)
    rows = curve_rows(Search(read_conversion(folder), curve))
    publish_table(rows, DOCS / "construction/max-loss.csv", DOCS / "construction.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
