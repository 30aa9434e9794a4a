"""Trains a tiny model for 2,000 steps and prints how much memory the process held on the way.

    python benchmarks/long_run.py --write

`--write` puts it into docs/reliability/long-run.csv and docs/reliability.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.conftest import make_place
from tests.fuzz.__main__ import write_figures

# a process of its own: what another run left in this one would hide a leak
_RUN = """
import json, psutil, moefy

sizes = {}

def report(progress):
    if progress.stage == "train" and progress.done in (200, 1900):
        sizes[progress.done] = psutil.Process().memory_info().rss

moefy.train(
    "moe", "out", data="text", tokens=2000 * 16, sequence_length=16, global_batch_size=1,
    checkpoint_every_steps=200, evaluate_every_steps=200, heldout_sequences=1, report=report,
)
print(json.dumps([sizes[200], sizes[1900]]))
"""


def resident_bytes(folder: Path) -> tuple[int, int]:
    """Train in an empty folder; return the resident set after step 200 and after step 1,900."""
    make_place(folder)
    command = [sys.executable, "-c", _RUN]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    early, late = json.loads(done.stdout)
    return early, late


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        early, late = resident_bytes(Path(folder))
    row = ["train", "2000", f"{early / 2**20:.0f}", f"{late / 2**20:.0f}", f"{late / early:.3f}"]
    print(row)
    if "--write" in sys.argv:
        header = ["command", "steps", "MiB after step 200", "MiB after step 1,900", "growth"]
        figures = Path(__file__).parents[1] / "docs/reliability/long-run.csv"
        write_figures(figures, [header, row], summed=False)


if __name__ == "__main__":
    main()
