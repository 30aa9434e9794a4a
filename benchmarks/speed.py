"""SmolLM2 and its splits in transformers: docs/runtimes.md.

    python benchmarks/speed.py WORK    # about 15 minutes on two quiet cores; conversions are kept

Writes docs/runtimes/transformers.csv (`moefy bench`, for half of every FFN in three splits),
experts.csv (the same, every expert implementation that was tried), machine.csv, and their tables in
docs/runtimes.md. A random split is as fast as any other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from publish import publish_table

import moefy
from moefy.evaluation.speed import SpeedComparison
from moefy.recipe import LLAMA_MOE
from moefy.report.tables import Rows, speed_rows

DOCS = Path(__file__).parents[1] / "docs"
HALF: dict[str, dict[str, Any]] = {
    "MoE 4/8": LLAMA_MOE | {"experts": 8, "active": 4},
    "MoE 8/16": LLAMA_MOE | {"experts": 16, "active": 8},
    "MoE 32/64, 16 shared": LLAMA_MOE | {"experts": 64, "active": 32, "shared": 16},
}


def main(work: Path) -> None:
    folders = {"dense": Path("smollm2-135m")}
    for name, choices in HALF.items():
        folders[name] = work / name.replace("/", "-")
        if not (folders[name] / "config.json").exists():
            moefy.convert("smollm2-135m", folders[name], **choices | {"repair": "none"})
    found = moefy.measure_speed(
        list(folders.values()), names=list(folders), prompt_tokens=256, new_tokens=32
    )
    publish("transformers", speed_rows(found))
    publish("experts", implementation_rows(found))
    publish("machine", machine_rows(found))


def implementation_rows(found: SpeedComparison) -> Rows:
    """Return tokens/s of every implementation that was tried."""
    tried = [speed for speed in found.speeds if speed.tried]
    names = sorted({name for speed in tried for name in speed.tried})
    rows = [["phase", "batch", "model", *names]]
    for speed in tried:
        cells = [f"{speed.tried[name]:.1f}" if name in speed.tried else "" for name in names]
        rows.append([speed.phase, str(speed.batch), speed.model, *cells])
    return rows


def machine_rows(found: SpeedComparison) -> Rows:
    return [["device", "threads", "type"], [found.device, str(found.threads), found.dtype]]


def publish(name: str, rows: Rows) -> None:
    publish_table(rows, DOCS / "runtimes" / f"{name}.csv", DOCS / "runtimes.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
