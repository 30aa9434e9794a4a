"""How long the benchmarks take, from a few items: table `suite-time` of docs/evaluation.md.

    moefy suite --limit 8 --dtype bfloat16 --json smollm2-135m > FILE
    python benchmarks/suite_time.py FILE

Costs are proportional to the items, so that seconds for a hundred items and for all follow from the
seconds for a few. The scores must not come from the cache (`MOEFY_CACHE` at an empty folder).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from publish import publish_table
from suite import ROOT, items_of

from moefy.evaluation.suite import PAPER_BENCHMARKS
from moefy.report.tables import Rows

_SUBJECTS = 57  # of MMLU, which asks as many of each
_LIMIT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="what `moefy eval --json` printed")
    (model,) = json.loads(parser.parse_args().file.read_text())["models"]
    rows: Rows = [["benchmark", "shots", "items", "seconds", "minutes for 100", "minutes for all"]]
    totals = {"zero-shot": [0.0, 0.0], "all eleven": [0.0, 0.0]}
    for benchmark in PAPER_BENCHMARKS:
        score = model["scores"][benchmark.name]
        asked = _LIMIT
        if benchmark.task == "mmlu":
            asked = math.ceil(_LIMIT / _SUBJECTS) * _SUBJECTS
        minutes = [
            score["elapsed_s"] / score["items"] * n / 60 for n in (asked, items_of(benchmark))
        ]
        for name in totals:
            if name == "all eleven" or not benchmark.shots:
                totals[name] = [a + b for a, b in zip(totals[name], minutes, strict=True)]
        measured = [str(score["items"]), f"{score['elapsed_s']:.1f}"]
        shown = [f"{value:.1f}" for value in minutes]
        rows.append([benchmark.name, str(benchmark.shots), *measured, *shown])
    rows += [[name, "", "", "", *(f"{v:.0f}" for v in both)] for name, both in totals.items()]
    file = ROOT / "docs" / "results" / "suite-time.csv"
    publish_table(rows, file, ROOT / "docs" / "evaluation.md")


if __name__ == "__main__":
    main()
