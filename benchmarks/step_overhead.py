"""What moefy's training step costs above a bare loop: docs/performance.md.

    python benchmarks/step_overhead.py WORK [--model smollm2-135m] [--steps 30]

`moefy train` runs as a user runs it (mixture, balance loss, log, distillation off), and after each
of its steps a bare loop does one of the same size on its own copy of the model: transformers' own
loss, backward, clipping, AdamW. So both meet the same machine, whatever else runs on it. Medians of
the steps after the first three; writes docs/performance/step-overhead.csv and the table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import moefy
from moefy.checkpoint.load import load_model
from moefy.checkpoint.source import resolve
from moefy.recipe import LLAMA_MOE
from moefy.report.tables import publish_table
from moefy.training.state import read_log

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHAPES = [(1, 512), (4, 128)]
_WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    rows = [["sequences × tokens", "experts", "bare s/step", "moefy s/step", "ratio", "steps"]]
    for experts, active in ((16, 8), (64, 32)):
        moe = options.work / f"{active}-of-{experts}"
        if not moe.exists():
            moefy.convert(resolve(options.model), moe, **LLAMA_MOE, experts=experts, active=active)
        for sequences, length in SHAPES:
            bare, ours = _measure(moe, sequences, length, options)
            rows.append(
                [
                    f"{sequences} × {length}",
                    f"{active}/{experts}",
                    f"{bare:.3f}",
                    f"{ours:.3f}",
                    f"{ours / bare:.3f}",
                    str(options.steps),
                ]
            )
            print(*rows[-1], sep="\t", flush=True)
    publish_table(rows, DOCS / "performance/step-overhead.csv", DOCS / "performance.md")


def _measure(
    moe: Path, sequences: int, length: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Return the median seconds of a bare step and of one of `moefy train`."""
    step, bare = _bare_step(moe, sequences, length, options.precision), []

    def after_step(progress: Any) -> None:
        if progress.stage == "train":
            started = time.perf_counter()
            step()
            bare.append(time.perf_counter() - started)

    out = options.work / "run"
    moefy.train(
        moe,
        out,
        tokens=options.steps * sequences * length,
        sequence_length=length,
        sequences_per_step=sequences,
        sequences_per_pass=sequences,
        precision=options.precision,
        checkpoint_every_steps=0,
        overwrite=True,
        report=after_step,
    )
    ours = [sequences * length / line["tokens_per_s"] for line in read_log(out)]
    return statistics.median(bare[_WARM_UP:]), statistics.median(ours[_WARM_UP:])


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
