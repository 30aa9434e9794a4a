"""MMLU, ARC-c and HellaSwag before and after tuning, dense and converted: docs/tuning.md.

    python benchmarks/tuned_benchmarks.py WORK DATA CONVERSATIONS [--limit 32]

Converts SmolLM2-135M to 8 of 16 slices, tunes both on the conversations, once over, and measures
all four models. What is in WORK is not made again, and finished tasks come from the cache. Writes
docs/tuning/benchmarks-tuned.csv and the table on the page. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from publish import publish_table

from moefy.evaluation.suite import SuiteResult, evaluate_suite
from moefy.report.tables import Rows, percent

PAGE = Path(__file__).parents[1] / "docs" / "tuning.md"
RESULT = PAGE.with_suffix("") / "benchmarks-tuned.csv"
DENSE, TASKS = "smollm2-135m", ("mmlu", "arc_challenge", "hellaswag")
SPLIT = ["--experts", "16", "--active", "8", "--shared", "4", "--set", "calibration_tokens=8192"]
SETTINGS = ["--epochs", "1", "--set", "sequence_length=256", "--set", "global_batch_size=16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("data", help="to convert with")
    parser.add_argument("conversations")
    parser.add_argument("--limit", type=int, default=32, help="items of each; of MMLU 57")
    given = parser.parse_args()
    moe = given.work / "moe"
    models = {"dense": DENSE, "dense, tuned": given.work / "dense-tuned"}
    models |= {"8/16": moe, "8/16, tuned": given.work / "moe-tuned"}
    _make(moe, "convert", DENSE, moe, "--data", given.data, *SPLIT)
    for name in ("dense", "8/16"):
        tuned = models[f"{name}, tuned"]
        _make(tuned, "tune", models[name], tuned, "--data", given.conversations, *SETTINGS)
    result = evaluate_suite(
        list(models.values()),
        names=list(models),
        tasks=TASKS,
        limit=given.limit,
        dtype="bfloat16",
    )
    publish_table(benchmark_rows(result), RESULT, PAGE)


def benchmark_rows(result: SuiteResult) -> Rows:
    """Return header and rows: a model a row, percent right."""
    names = [benchmark.name for benchmark in result.benchmarks]
    rows = [["model", *(f"{name}, %" for name in names)]]
    for model in result.models:
        scores = [model.scores[name] for name in names]
        rows.append([model.name, *(percent(score.value, score.stderr) for score in scores)])
    return rows


def _make(folder: Path, *words: object) -> None:
    if not (folder / "config.json").exists():
        moefy = Path(sys.executable).with_name("moefy")
        subprocess.run([str(moefy), *map(str, words)], check=True)


if __name__ == "__main__":
    main()
