"""What moefy's training step costs above a bare loop: docs/performance.md.

    python benchmarks/step_overhead.py WORK [--model smollm2-135m] [--steps 30]

`moefy train` runs as a user runs it (mixture, balance loss, log, distillation off), and after each
of its steps a bare loop does one of the same size on its own copy of the model: transformers' own
loss, backward, clipping, AdamW. So both meet the same machine, whatever else runs on it. All that
`moefy train` does between two steps counts. Medians of the steps after the first three, in seconds
and in processor seconds, which other programs disturb less. Writes
docs/performance/step-overhead.csv and the table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from publish import publish_table

import moefy
from moefy.checkpoint.load import load_model
from moefy.checkpoint.source import resolve
from moefy.recipe import LLAMA_MOE

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHAPES = [(1, 512), (4, 128)]
WHO, UNITS = ("bare", "moefy"), ("s", "processor s")
_WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    rows = [["sequences × tokens", "experts", *(f"{who} {unit}" for unit in UNITS for who in WHO)]]
    rows[0] += ["ratio", "ratio, processor"]
    for experts, active in ((16, 8), (64, 32)):
        moe = options.work / f"{active}-of-{experts}"
        if not moe.exists():
            moefy.convert(resolve(options.model), moe, **LLAMA_MOE, experts=experts, active=active)
        for sequences, length in SHAPES:
            bare, ours = _measure(moe, sequences, length, options)
            seconds = [value for pair in zip(bare, ours, strict=True) for value in pair]
            ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
            numbers = [f"{value:.3f}" for value in [*seconds, *ratios]]
            rows.append([f"{sequences} × {length}", f"{active}/{experts}", *numbers])
            print(*rows[-1], sep="\t", flush=True)
    publish_table(rows, DOCS / "performance/step-overhead.csv", DOCS / "performance.md")


def _measure(
    moe: Path, sequences: int, length: int, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Return the median seconds and processor seconds of a bare step and of moefy's."""
    step = _bare_step(moe, sequences, length, options.precision)
    marks: list[tuple[float, float]] = []

    def after_step(progress: Any) -> None:
        if progress.stage == "train":
            marks.append(_clocks())
            step()
            marks.append(_clocks())

    moefy.train(
        moe,
        options.work / "run",
        tokens=options.steps * sequences * length,
        sequence_length=length,
        global_batch_size=sequences,
        micro_batch_size=sequences,
        precision=options.precision,
        checkpoint_every_steps=0,
        overwrite=True,
        report=after_step,
    )
    between = np.diff(np.array(marks), axis=0)  # bare, moefy, bare, …
    return tuple(np.median(between[first::2][_WARM_UP:], axis=0).tolist() for first in (0, 1))


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _bare_step(moe: Path, sequences: int, length: int, precision: str) -> Any:
    model = load_model(moe, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (sequences, length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
