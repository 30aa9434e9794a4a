"""What asking the system for the same memory again costs: docs/performance.md.

    python benchmarks/memory.py WORK [--model smollm2-135m] [--rounds 2] [--steps 6]

Training (32 of 64 slices, float32) and reading (the same model, 512 tokens at once), each in a
process of its own, in rounds: as glibc and torch do by themselves, with huge pages, and with freed
memory kept as well. Writes docs/performance/memory.csv and the table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from publish import publish_table

import moefy
from moefy import hardware
from moefy.recipe import LLAMA_MOE
from moefy.training.state import read_log

DOCS = Path(__file__).resolve().parent.parent / "docs"
WAYS = {"as usual": (0, 0), "huge pages": (1, 0), "huge pages, freed memory kept": (1, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(options)))
        return
    moe = options.work / "moe"
    if not moe.exists():
        moefy.convert(options.model, moe, **LLAMA_MOE, experts=64, active=32)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(options.rounds):
        for doing in ("train", "read"):
            for way, (huge, kept) in WAYS.items():
                if doing == "read" and kept:
                    continue  # it is kept in training alone
                environment = os.environ | {"THP_MEM_ALLOC_ENABLE": str(huge)}
                command = [sys.executable, *sys.argv, "--one", f"{doing} {kept}"]
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                )
                numbers = json.loads(done.stdout.splitlines()[-1])
                found.setdefault((doing, way), []).append(numbers)
    header = ["doing", "memory", "tokens/s", "of usual", "in the kernel", "page faults, million"]
    rows = [[*header, "peak GiB"]]
    for (doing, way), runs in found.items():
        speed, kernel, faults, peak = (statistics.median(run[i] for run in runs) for i in range(4))
        usual = statistics.median(run[0] for run in found[doing, "as usual"])
        cells = [f"{speed:.0f}", f"{speed / usual:.2f}", f"{kernel:.0%}", f"{faults / 1e6:.1f}"]
        rows.append([doing, way, *cells, f"{peak:.2f}"])
        print(*rows[-1], sep="\t", flush=True)
    publish_table(rows, DOCS / "performance/memory.csv", DOCS / "performance.md")


def _one(options: argparse.Namespace) -> list[float]:
    """Return tokens/s, the kernel's share of processor time, page faults, and peak GiB."""
    doing, kept = options.one.split()
    if kept == "0":
        hardware._KEEPING = {}
    moe, out = options.work / "moe", options.work / "run"
    if doing == "train":
        moefy.train(moe, out, tokens=512 * options.steps, precision="float32", overwrite=True)
        speed = statistics.median(line["tokens_per_s"] for line in read_log(out)[1:])
    else:
        done = moefy.evaluate(moe, windows=options.steps, decode=False)
        speed = done.results[0].prefill_tokens_per_s
    used = resource.getrusage(resource.RUSAGE_SELF)
    kernel = used.ru_stime / (used.ru_stime + used.ru_utime)
    return [speed, kernel, used.ru_minflt, used.ru_maxrss / 2**20]


if __name__ == "__main__":
    main()
