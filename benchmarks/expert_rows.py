"""What rounding the rows of an expert up does to training in bfloat16 on a CPU.

    python benchmarks/expert_rows.py WORK [--model smollm2-135m] [--steps 8] [--rounds 1]

Training of 4 of 16 and of 32 of 64 slices on one sequence of 512 tokens a step, each number of rows
in a process of its own. Tokens/s: medians of the second half of the steps. Writes
docs/performance/expert-rows.csv and the table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from publish import publish_table

import moefy
from moefy.checkpoint import expert_layers as layers
from moefy.recipe import LLAMA_MOE
from moefy.training.state import read_log

DOCS = Path(__file__).resolve().parent.parent / "docs"
SPLITS = ((4, 16), (32, 64))
ROWS = (1, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(_one(Path(options.one[0]), int(options.one[1]), options))
        return
    found: dict[tuple[str, int], list[float]] = {}
    for active, experts in SPLITS:
        moe = options.work / f"{active}-of-{experts}"
        if not moe.exists():
            moefy.convert(options.model, moe, **LLAMA_MOE, experts=experts, active=active)
        for _ in range(options.rounds):
            for rows in ROWS:
                command = [sys.executable, *sys.argv, "--one", str(moe), str(rows)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                speed = float(done.stdout.splitlines()[-1])
                found.setdefault((f"{active}/{experts}", rows), []).append(speed)
    table = [["slices", "rows a multiple of", "tokens/s", "of every number"]]
    for (split, rows), speeds in found.items():
        speed, unrounded = statistics.median(speeds), statistics.median(found[split, 1])
        table.append([split, str(rows), f"{speed:.0f}", f"{speed / unrounded:.2f}"])
        print(*table[-1], sep="\t", flush=True)
    publish_table(table, DOCS / "performance/expert-rows.csv", DOCS / "performance.md")


def _one(moe: Path, rows: int, options: argparse.Namespace) -> float:
    """Return tokens/s."""
    layers._ROUND_ROWS = rows
    out = options.work / "run"
    moefy.train(moe, out, tokens=512 * options.steps, precision="bfloat16", overwrite=True)
    log = read_log(out)
    return statistics.median(line["tokens_per_s"] for line in log[len(log) // 2 :])


if __name__ == "__main__":
    main()
