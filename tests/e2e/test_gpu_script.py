"""benchmarks/gpu.py runs where only torch and transformers are, and rehearses on a CPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"
# the packages that a bare machine with torch and transformers may lack
BARE = """
import runpy, sys
for name in ("pydantic", "typer", "jaxtyping", "gguf", "rich", "jinja2", "accelerate"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_section_is_rehearsed_on_a_bare_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, str(SCRIPT), "--rehearse", "--minutes", "0.03"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for file in tmp_path.glob("*.csv"):
        with file.open(newline="") as lines:
            found[file.stem] = list(csv.DictReader(lines))
    models = ["dense", "dense, active size", "8/16", "4/8"]
    assert [row["model"] for row in found["training"]] == models
    assert all(0 < float(row["mfu"]) < 1 for row in found["training"])
    assert len(found["experts"]) == 3 * 3  # splits, implementations
    assert len(found["decode"]) == 2 * 2 + 2 * 2 * 2  # dense ones, and splits in two ways
    curve = [(int(row["tokens"]), float(row["kl_to_dense"])) for row in found["recovery"]]
    assert curve[0][0] == 0 < curve[-1][0]
    assert curve[-1][1] < curve[0][1]
    assert (tmp_path / "gpu.png").is_file()
