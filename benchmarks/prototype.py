"""Ways to build experts on the very tokens of the first prototype: docs/experiments.md, section 3.

    python benchmarks/prototype.py ../shared/data/prototype_windows.npz OUT [PART-OF-NAME …]

Writes OUT/leaderboard.{csv,md,png}; OUT/scores.jsonl is kept, so that it resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.source import resolve
from moefy.construct.leaderboard import (
    METHODS,
    Bench,
    read_scores,
    write_leaderboard,
    write_scores,
)


def main(file: str, out: Path, parts: list[str]) -> None:
    windows = np.load(file)
    domains = windows["domains"].tolist()
    evaluation = windows["evaluation"].astype(np.int64).reshape(len(domains), -1, 512)
    bench = Bench(
        DenseCheckpoint(resolve("smollm2-135m")),
        windows["calibration"].astype(np.int64),
        dict(zip(domains, evaluation, strict=True)),
    )
    known = read_scores(out, "prototype")
    known["dense", 1, 1] = bench.dense_score
    print(f"dense {bench.dense_score.loss:.4f}", flush=True)
    for active in (32, 16, 48):
        for method in METHODS:
            if parts and not any(part in method.name for part in parts):
                continue
            if (method.name, 64, active) not in known:
                score = bench.score(method, 64, active)
                known[score.method, 64, active] = score
                write_scores(out, "prototype", known)
                print(
                    f"{active}/64 {score.nats_above_dense:.4f} {method.name} "
                    f"{score.construct_s:.0f} s",
                    flush=True,
                )
    write_leaderboard(out, list(known.values()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
