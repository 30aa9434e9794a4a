"""Learning rate and batch size for the demo's short training: docs/experiments.md, section 1.

    python benchmarks/training_settings.py WORK    # about 40 minutes on two cores; resumes

Trains SmolLM2-135M, split 4/16, on the demo text with every setting, compares all of them on
held-out documents in one run, and writes docs/experiments/training-settings.csv.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import moefy
from moefy.recipe import LLAMA_MOE
from moefy.training.state import read_log

SETTINGS = [  # tokens, learning rate, sequences of 512 tokens per step
    (32_768, 3e-3, 4),
    (32_768, 1e-3, 4),
    (32_768, 3e-3, 2),
    (32_768, 1e-3, 2),
    (32_768, 3e-4, 2),
    (32_768, 1e-3, 1),
    (32_768, 5e-4, 1),
    (32_768, 3e-4, 1),
    (32_768, 2e-4, 1),
    (32_768, 1e-4, 1),
    (65_536, 1e-3, 2),
    (65_536, 1e-3, 1),
    (65_536, 3e-4, 1),
]
RESULT = Path(__file__).parents[1] / "docs" / "experiments" / "training-settings.csv"


def main(work: Path) -> None:
    if not (work / "moe").exists():
        moefy.convert("smollm2-135m", work / "moe", experts=16, active=4, **LLAMA_MOE)
    runs = []
    for tokens, learning_rate, sequences in SETTINGS:
        out = work / f"{tokens}-lr{learning_rate:g}-s{sequences}"
        runs.append(out)
        if not (out / "config.json").exists():
            settings = {"learning_rate": learning_rate, "sequences_per_step": sequences}
            moefy.train(work / "moe", out, tokens=tokens, **settings)
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
