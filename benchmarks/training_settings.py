"""Learning rates for the demo's short training: docs/experiments.md, section 1.

    python benchmarks/training_settings.py WORK    # about half an hour on two cores; resumes

Converts SmolLM2-135M as `convert` does by default, trains it on the demo text with every setting,
compares all of them on held-out documents in one run, and writes
docs/experiments/learning-rates.csv.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import moefy
from moefy.training.state import read_log

SETTINGS = [  # tokens, learning rate
    (4_096, 3e-4),
    (4_096, 1e-4),
    (4_096, 5e-5),
    (4_096, 2e-5),
    (32_768, 3e-4),
    (32_768, 1e-4),
    (32_768, 5e-5),
]
RESULT = Path(__file__).parents[1] / "docs" / "experiments" / "learning-rates.csv"


def main(work: Path) -> None:
    if not (work / "moe").exists():
        moefy.convert("smollm2-135m", work / "moe")
    runs = []
    for tokens, learning_rate in SETTINGS:
        out = work / f"{tokens}-lr{learning_rate:g}"
        runs.append(out)
        if not (out / "config.json").exists():
            moefy.train(work / "moe", out, tokens=tokens, learning_rate=learning_rate)
    models = ["smollm2-135m", work / "moe", *runs]
    rows = moefy.evaluate(models, decode=False).results
    with RESULT.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["model", "steps", "perplexity", "kl_to_dense"])
        for model, row in zip(models, rows, strict=True):
            steps = len(read_log(model)) if model in runs else 0
            name = Path(row.name).name
            table.writerow([name, steps, f"{row.perplexity:.1f}", f"{row.kl_to_reference:.4f}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
