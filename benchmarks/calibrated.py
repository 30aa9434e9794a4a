"""The calibrated default on LLaMA-2-7B's layers, against its FLOPs: docs/experiments.md, 6.

    python benchmarks/calibrated.py WORK    # needs 3 GB of disk, 9 GB of memory, about an hour

Random bfloat16 weights and random tokens; half of the d_ff, so that the growth shows, and the
tokens of `high`, so that it shows what does not grow. Every case is a process of its own. Writes
docs/experiments/calibrated.csv.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from publish import publish_table, rows_of
from streaming import make_model

from moefy.calibrate.replay import ModelReplay
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.construct.convert import calibration_walk, split_layers
from moefy.hardware import training_precision
from moefy.recipe import ConvertRecipe

DOCS = Path(__file__).parents[1] / "docs"
RESULT, PAGE = DOCS / "experiments" / "calibrated.csv", DOCS / "experiments.md"
CASES: tuple[tuple[int, int, dict[str, Any]], ...] = (  # layers, d_ff, recipe
    (1, 5504, {"effort": "normal"}),
    (1, 11008, {"effort": "normal"}),
    # how long many tokens are fitted decides the time alone
    (1, 11008, {"calibration_tokens": 172_032, "fit_epochs": 0.1}),
)
SEQUENCE = 512
LAYERS_OF_7B = 32


def teraflops(
    recipe: ConvertRecipe, tokens: int, hidden: int, inner: int
) -> tuple[float, float, float]:
    """Return what a layer must do, in units of 1e12: in float32, in float64, and of the fit.

    The dense and the converted stream each pass attention (8·T·H² and its scores); the FFN is
    evaluated for the dense stream (6·T·H·F), for the other's activations (4·T·H·F) and after the
    refit (2·T·H·F); the refit needs Hᵀ·Y (2·T·H·F) and half of the Gram matrix (T·F²), the router
    the inputs' (2·T·H²). Factors and solutions are in float64: F³/3 + 2·F²·H + H³/3. Each pass of
    the fit needs three products with the active part of each of the three matrices (18·T·H·F·k/E).
    """
    closed = min(tokens, recipe.refit_tokens)
    single = 2 * (8 * tokens * hidden**2 + 4 * tokens * SEQUENCE * hidden)
    single += 6 * (tokens - closed) * hidden * inner
    single += 14 * closed * hidden * inner + closed * inner**2 + 2 * closed * hidden**2
    fit = 0.0
    if recipe.repair == "fit":
        assert recipe.fit_epochs is not None
        share = recipe.split.active / recipe.split.experts
        fit = recipe.fit_epochs * tokens * hidden * inner * 18 * share
    double = inner**3 / 3 + 2 * inner**2 * hidden + hidden**3 / 3
    return single / 1e12, double / 1e12, fit / 1e12


def matmul_rate(dtype: torch.dtype, size: int = 4096) -> float:
    """Return the machine's rate for a product of square matrices, in TFLOP/s: best of three."""
    matrix = torch.randn(size, size, dtype=dtype)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e12


def measure(folder: Path, chosen: dict[str, Any]) -> dict[str, str]:
    """Split the layers of a model; return a row of the table."""
    precision = getattr(torch, training_precision("auto"))
    rates = matmul_rate(torch.float32), matmul_rate(torch.float64, 2048), matmul_rate(precision)
    dense = DenseCheckpoint(folder)
    hidden, inner = dense.config["hidden_size"], dense.config["intermediate_size"]
    recipe = ConvertRecipe.build(**chosen).for_model(inner)
    assert recipe.calibration_tokens is not None
    windows = recipe.calibration_tokens // SEQUENCE
    ids = np.random.default_rng(0).integers(0, dense.config["vocab_size"], (windows, SEQUENCE))
    started = time.perf_counter()
    walk = calibration_walk(ModelReplay(dense), recipe, ids)
    for split in split_layers(dense, recipe, walk):
        del split
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    work = teraflops(recipe, ids.size, hidden, inner)
    bound = sum(part / rate for part, rate in zip(work, rates, strict=True))
    return {
        "effort": recipe.effort if chosen.keys() == {"effort"} else "a tenth of a pass",
        "layers": str(dense.num_layers),
        "d_ff": str(inner),
        "tokens": str(ids.size),
        "s/layer": f"{seconds / dense.num_layers:.0f}",
        "TFLOP/layer": f"{sum(work):.1f}",
        "float32, GFLOP/s": f"{1000 * rates[0]:.0f}",
        "float64, GFLOP/s": f"{1000 * rates[1]:.0f}",
        "fit, GFLOP/s": f"{1000 * rates[2]:.0f}",
        "bound, s/layer": f"{bound:.0f}",
        "of the bound": f"{bound * dense.num_layers / seconds:.2f}",
        "peak GiB": f"{int(peak.split()[1]) / 2**20:.2f}",
        "hours for 32 layers": f"{LAYERS_OF_7B * seconds / dense.num_layers / 3600:.2f}",
    }


def main(work: Path) -> None:
    rows = []
    for num_layers, inner, chosen in CASES:
        folder = work / f"llama-2-7b-{num_layers}-{inner}"
        make_model(folder, num_layers, inner)
        command = [sys.executable, __file__, "--measure", str(folder), json.dumps(chosen)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        shutil.rmtree(folder)
        rows.append(json.loads(printed))
        print(printed, end="", flush=True)
        publish_table(rows_of(rows), RESULT, PAGE)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(Path(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        main(Path(sys.argv[1]))
