"""Ways to build experts on the very tokens of the first prototype: docs/experiments.md, section 3.

    python benchmarks/prototype.py ../shared/data/prototype_windows.npz OUT [NAME …]

Writes OUT/leaderboard.{csv,md,png}; OUT/scores.jsonl is kept, so that it resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.source import resolve
from moefy.studies.bench import Bench
from moefy.studies.methods import methods_named
from moefy.studies.scores import key_of, read_scores, write_leaderboard, write_scores


def main(file: str, out: Path, names: list[str]) -> None:
    windows = np.load(file)
    domains = windows["domains"].tolist()
    evaluation = windows["evaluation"].astype(np.int64).reshape(len(domains), -1, 512)
    bench = Bench(
        DenseCheckpoint(resolve("smollm2-135m")),
        windows["calibration"].astype(np.int64),
        dict(zip(domains, evaluation, strict=True)),
    )
    known = read_scores(out, "prototype")
    known[key_of(bench.dense_score)] = bench.dense_score
    print(f"dense {bench.dense_score.loss:.4f}", flush=True)
    for fraction in (0.5, 0.75, 0.25):
        for method in methods_named(names):
            recipe = method.recipe(64, fraction, 0).for_model(1536)
            split = recipe.split
            if (method.name, split.experts, split.active) in known:
                continue
            score = bench.score(method, recipe)
            known[key_of(score)] = score
            write_scores(out, "prototype", known.values())
            print(f"{fraction} {score.nats_above_dense:.4f} {method.name}", flush=True)
    write_leaderboard(out, list(known.values()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
