"""Training throughput of MoE and dense models: docs/performance.md.

    python benchmarks/training_speed.py WORK [--model smollm2-135m] [--data demo] [--steps 6]

Dense, dense of the active size, converted to 8 of 16 and to 32 of 64 slices, and the former while
it is distilled: the same sequences, each by `moefy train`, in rounds. Tokens/s are of the log,
medians of the steps after each round's first. Weights do not matter: the splits are random.

MFU = 3 · FLOPs of a forward pass · tokens/s / peak FLOP/s (PaLM, arXiv 2204.02311, appendix B). It
counts the experts that run, not those that wait, and not the teacher.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu import TRAINED_PASSES, peak_flops
from publish import publish_table

import moefy
from moefy.checkpoint.cost import cost
from moefy.checkpoint.reader import read_config, side_files
from moefy.checkpoint.source import resolve
from moefy.evaluation.contenders import dense_of_active_size, random_model
from moefy.recipe import LLAMA_MOE
from moefy.training.state import read_log

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=1, help="per step")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    models = _models(options)
    header = ["precision", "model", "tokens/s", "of dense", "of dense, active size", "MFU"]
    rows = [header]
    for precision in options.precisions:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(options.rounds):
            for name, (folder, choices) in models.items():
                found[name] += _steps(folder, precision, options, choices)
        rate = {name: statistics.median(t for t, _ in steps) for name, steps in found.items()}
        for name, steps in found.items():
            rows.append(
                [
                    precision,
                    name,
                    f"{rate[name]:.0f}",
                    f"{rate[name] / rate['dense']:.2f}",
                    f"{rate[name] / rate['dense, active size']:.2f}",
                    f"{statistics.median(mfu for _, mfu in steps):.0%}",
                ]
            )
            print(*rows[-1], sep="\t", flush=True)
    name = "training-speed-gpu" if torch.cuda.is_available() else "training-speed"
    publish_table(rows, DOCS / f"performance/{name}.csv", DOCS / "performance.md")


def _models(options: argparse.Namespace) -> dict[str, tuple[Path, dict[str, Any]]]:
    dense = resolve(options.model)
    splits = {}
    for active, experts in ((8, 16), (32, 64)):
        splits[f"{active}/{experts}"] = options.work / f"{active}-of-{experts}"
        if not splits[f"{active}/{experts}"].exists():
            moefy.convert(
                dense,
                splits[f"{active}/{experts}"],
                **LLAMA_MOE | {"shared": active // 2},
                experts=experts,
                active=active,
            )
    small = options.work / "dense-active"
    if not small.exists():
        config = dense_of_active_size(read_config(splits["8/16"]))
        random_model(config, torch.float32).save_pretrained(small)
        for file in side_files(dense):
            shutil.copyfile(file, small / file.name)
    return {
        "dense": (dense, {}),
        "dense, active size": (small, {}),
        **{name: (folder, {}) for name, folder in splits.items()},
        "8/16, distilled": (splits["8/16"], {"teacher": str(dense)}),
    }


def _steps(
    folder: Path, precision: str, options: argparse.Namespace, choices: dict[str, Any]
) -> list[tuple[float, float]]:
    """Train for a few steps and return tokens/s and MFU of all but the first."""
    out, tokens = options.work / "run", options.sequences * options.sequence_length
    moefy.train(
        folder,
        out,
        data=options.data,
        tokens=options.steps * tokens,
        sequence_length=options.sequence_length,
        global_batch_size=options.sequences,
        micro_batch_size=options.sequences,
        precision=precision,
        checkpoint_every_steps=0,
        evaluate_every_steps=0,
        overwrite=True,
        **choices,
    )
    one_pass = cost(read_config(resolve(folder)), context=options.sequence_length)
    mfu = TRAINED_PASSES * one_pass.flops_per_token / peak_flops(precision)
    speeds = [line["tokens_per_s"] for line in read_log(out)[1:]]
    return [(speed, mfu * speed) for speed in speeds]


if __name__ == "__main__":
    main()
