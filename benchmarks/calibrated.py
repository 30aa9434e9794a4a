"""The calibrated default on LLaMA-2-7B's layers, against its FLOPs: docs/experiments.md, 6.

    python benchmarks/calibrated.py WORK    # needs 3 GB of disk, 9 GB of memory, about 15 minutes

Random bfloat16 weights and random tokens of the default number; one and two layers and half the
d_ff, so that the growth shows. Every case is a process of its own. Writes
docs/experiments/calibrated.csv.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from publish import publish_table, rows_of
from streaming import make_model

from moefy.calibrate.replay import ModelReplay
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.construct.convert import calibration_walk, split_layers
from moefy.recipe import ConvertRecipe

DOCS = Path(__file__).parents[1] / "docs"
RESULT, PAGE = DOCS / "experiments" / "calibrated.csv", DOCS / "experiments.md"
CASES = ((1, 5504), (2, 5504), (1, 11008))
SEQUENCE = 512
LAYERS_OF_7B = 32


def teraflops(tokens: int, hidden: int, inner: int) -> tuple[float, float]:
    """Return what a layer must do, in units of 1e12: in float32, and in float64.

    The dense and the converted stream each pass attention (8·T·H² and its scores); the FFN is
    evaluated for the dense stream (6·T·H·F), for the other's activations (4·T·H·F) and after the
    refit (2·T·H·F); the refit needs Hᵀ·Y (2·T·H·F) and half of the Gram matrix (T·F²), the router
    the inputs' (2·T·H²). Factors and solutions are in float64: F³/3 + 2·F²·H + H³/3.
    """
    single = 2 * (8 * tokens * hidden**2 + 4 * tokens * SEQUENCE * hidden)
    single += 14 * tokens * hidden * inner + tokens * inner**2 + 2 * tokens * hidden**2
    return single / 1e12, (inner**3 / 3 + 2 * inner**2 * hidden + hidden**3 / 3) / 1e12


def matmul_rate(dtype: torch.dtype, size: int = 4096) -> float:
    """Return the machine's rate for a product of square matrices, in TFLOP/s: best of three."""
    matrix = torch.randn(size, size, dtype=dtype)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e12


def measure(folder: Path) -> dict[str, str]:
    """Split the layers of a model; return a row of the table."""
    rates = matmul_rate(torch.float32), matmul_rate(torch.float64, 2048)
    dense = DenseCheckpoint(folder)
    hidden, inner = dense.config["hidden_size"], dense.config["intermediate_size"]
    recipe = ConvertRecipe(effort="fast").for_model(inner)
    windows = recipe.calibration_tokens // SEQUENCE
    ids = np.random.default_rng(0).integers(0, dense.config["vocab_size"], (windows, SEQUENCE))
    started = time.perf_counter()
    walk = calibration_walk(ModelReplay(dense), recipe, ids)
    for split in split_layers(dense, recipe, walk):
        del split
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    single, double = teraflops(ids.size, hidden, inner)
    bound = single / rates[0] + double / rates[1]
    return {
        "layers": str(dense.num_layers),
        "d_ff": str(inner),
        "tokens": str(ids.size),
        "s/layer": f"{seconds / dense.num_layers:.0f}",
        "TFLOP/layer": f"{single + double:.1f}",
        "float32, GFLOP/s": f"{1000 * rates[0]:.0f}",
        "float64, GFLOP/s": f"{1000 * rates[1]:.0f}",
        "bound, s/layer": f"{bound:.0f}",
        "of the bound": f"{bound * dense.num_layers / seconds:.2f}",
        "peak GiB": f"{int(peak.split()[1]) / 2**20:.2f}",
        "hours for 32 layers": f"{LAYERS_OF_7B * seconds / dense.num_layers / 3600:.2f}",
    }


def main(work: Path) -> None:
    rows = []
    for num_layers, inner in CASES:
        folder = work / f"llama-2-7b-{num_layers}-{inner}"
        make_model(folder, num_layers, inner)
        command = [sys.executable, __file__, "--measure", str(folder)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        shutil.rmtree(folder)
        rows.append(json.loads(printed))
        print(printed, end="", flush=True)
        publish_table(rows_of(rows), RESULT, PAGE)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        main(Path(sys.argv[1]))
