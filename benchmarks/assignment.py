"""Seconds of the balanced assignment by size, against scipy's exact one where that is feasible.

python benchmarks/assignment.py     # writes docs/experiments/assignment.csv; about a minute
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from moefy.construct.partition.balanced import balanced_assignment

RESULT = Path(__file__).parents[1] / "docs" / "experiments" / "assignment.csv"
SIZES = [(1536, 16), (1536, 64), (3584, 64), (7168, 64), (14_336, 64), (14_336, 128)]
EXACT_ITEMS = 3584


def main() -> None:
    with RESULT.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["neurons", "experts", "seconds", "exact_seconds", "share_of_optimum"])
        for items, clusters in SIZES:
            centres = np.random.default_rng(0).standard_normal((clusters, 32))
            points = np.random.default_rng(1).standard_normal((items, 32))
            value = points @ centres.T
            capacity = np.full(clusters, items // clusters)
            started = time.perf_counter()
            cluster = balanced_assignment(value, capacity)
            seconds = time.perf_counter() - started
            exact_s = share = ""
            if items <= EXACT_ITEMS:
                started = time.perf_counter()
                rows, columns = linear_sum_assignment(
                    np.repeat(value, items // clusters, axis=1), maximize=True
                )
                exact_s = f"{time.perf_counter() - started:.2f}"
                best = value[rows, columns // (items // clusters)].sum()
                share = f"{value[np.arange(items), cluster].sum() / best:.5f}"
            table.writerow([items, clusters, f"{seconds:.2f}", exact_s, share])
            print(items, clusters, seconds, exact_s, share, flush=True)


if __name__ == "__main__":
    main()
