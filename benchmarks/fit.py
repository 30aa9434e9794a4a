"""Closed form against fit, split against pruned: docs/construction/fit.csv, its table and figure.

    python benchmarks/fit.py WORK DATA [DESIGN[, EFFORT]...]    # DATA: ../shared/data/pretrain
    python benchmarks/fit.py WORK    # the table of what WORK has

Every design ("8 of 16", "8 of 16, high"; without an effort: fast and normal) is a `moefy convert`
and a `moefy eval` on held-out documents, 28,672 tokens of seven domains. What WORK has already is
not run again, so the command may be stopped and goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import frontier
from publish import publish_table

DOCS = Path(__file__).parents[1] / "docs"
MOEFY = [sys.executable, "-m", "moefy"]
MODEL = "smollm2-135m"
SPLITS = {
    "8 of 16": ["--experts", "16", "--active", "8", "--shared", "0"],
    "4 of 8, 2 shared": ["--experts", "8", "--active", "4", "--shared", "2"],
    "8 of 16, 4 shared": ["--experts", "16", "--active", "8", "--shared", "4"],
    "8 of 16, 6 shared": ["--experts", "16", "--active", "8", "--shared", "6"],
    "pruned to 8 of 16": ["--experts", "16", "--active", "8", "--shared", "8"],
    "32 of 64": ["--experts", "64", "--active", "32", "--shared", "16"],
    "12 of 16": ["--experts", "16", "--active", "12", "--shared", "0"],
    "pruned to 12 of 16": ["--experts", "16", "--active", "12", "--shared", "12"],
    "48 of 64": ["--experts", "64", "--active", "48", "--shared", "24"],
    "4 of 16": ["--experts", "16", "--active", "4", "--shared", "0"],
    "pruned to 4 of 16": ["--experts", "16", "--active", "4", "--shared", "4"],
    "16 of 64": ["--experts", "64", "--active", "16", "--shared", "8"],
    "2 of 8": ["--experts", "8", "--active", "2", "--shared", "0"],
}


def main(work: Path, data: str | None, designs: list[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for asked in designs or SPLITS if data else ():
        name, _, effort = (asked, "", "") if asked in SPLITS else asked.rpartition(", ")
        for each in [effort] if effort else ["fast", "normal"]:
            convert(work, data, name, each)
    if data:
        evaluate(work, data)
    rows = [
        [
            "design",
            "share of the FFN",
            "effort",
            "tokens",
            "nats above dense",
            "KL to dense",
            "convert, min",
            "peak GiB",
        ]
    ]
    for name, split in SPLITS.items():
        for file in sorted(work.glob(f"{name.replace(' ', '-')}-*.json")):
            found = json.loads(file.read_text())
            share = int(split[3]) / int(split[1])
            rows.append([name, f"{share:.0%}", *found.values()])
    publish_table(rows, DOCS / "construction/fit.csv", DOCS / "construction.md")
    frontier.draw()


def convert(work: Path, data: str, name: str, effort: str) -> None:
    """Convert one design, unless its file is there."""
    place = f"{name.replace(' ', '-')}-{effort}"
    file, out = work / f"{place}.json", work / place
    if file.exists():
        return
    options = [*SPLITS[name], "--effort", effort]
    started = time.monotonic()
    child = subprocess.Popen(
        [*MOEFY, "convert", MODEL, str(out), "--data", data, *options, "--overwrite"]
    )
    _, status, usage = os.wait4(child.pid, 0)
    minutes = (time.monotonic() - started) / 60
    assert status == 0, name
    recipe = json.loads((out / "moefy.json").read_text())["recipe"]
    record = {
        "effort": effort,
        "tokens": str(recipe["calibration_tokens"]),
        "nats": "",
        "kl": "",
        "minutes": f"{minutes:.1f}",
        "peak": f"{usage.ru_maxrss / 2**20:.1f}",
    }
    file.write_text(json.dumps(record) + "\n")


def evaluate(work: Path, data: str) -> None:
    """Measure all models whose loss is not known yet, in one run."""
    records = {file: json.loads(file.read_text()) for file in sorted(work.glob("*.json"))}
    new = [file for file, record in records.items() if not record["nats"]]
    if not new:
        return
    models = [MODEL, *(str(file.with_suffix("")) for file in new)]
    for file, found in zip(new, results(models, data)[1:], strict=True):
        record = records[file]
        record["nats"] = f"{found['excess_loss']['value']:.3f}"
        record["kl"] = f"{found['kl_to_reference']:.3f}"
        file.write_text(json.dumps(record) + "\n")


def results(models: list[str], data: str) -> list[dict[str, Any]]:
    """Return what `moefy eval` finds for models, in a process of its own."""
    command = [*MOEFY, "eval", *models, "--data", data, "--no-decode", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None, sys.argv[3:])
