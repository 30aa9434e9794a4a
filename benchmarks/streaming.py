"""Weight-only conversion of LLaMA-2-7B's shape against copying its bytes: docs/experiments.md, 5.

    python benchmarks/streaming.py WORK    # needs 45 GB of disk, about 10 minutes

Random bfloat16 weights, made on the fly; 8, 16 and 32 layers, so that the growth shows. Copy and
conversion alternate, three times each at 8 layers and twice above, every one in a process of its
own and until the bytes are on the disk. Writes docs/experiments/streaming.csv.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from publish import publish_table, rows_of

from moefy.checkpoint.cost import SHAPES
from moefy.checkpoint.writer import ShardWriter

DOCS = Path(__file__).parents[1] / "docs"
RESULT, PAGE = DOCS / "experiments" / "streaming.csv", DOCS / "experiments.md"

COPY = """
import os, shutil, sys, time
started = time.perf_counter()
shutil.copytree(sys.argv[1], sys.argv[2])
for name in os.listdir(sys.argv[2]):
    with open(os.path.join(sys.argv[2], name), "rb") as file:
        os.fsync(file.fileno())
print(time.perf_counter() - started, 0)
"""
CONVERT = """
import sys, time
import moefy
from moefy.recipe import LLAMA_MOE
moefy.convert  # imports are not what is measured
started = time.perf_counter()
moefy.convert(sys.argv[1], sys.argv[2], experts=16, active=4, **LLAMA_MOE)
seconds = time.perf_counter() - started
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, 1024 * int(peak.split()[1]))
"""


def make_model(folder: Path, num_layers: int, inner: int = 11008) -> None:
    config = SHAPES["llama-2-7b"] | {
        "num_hidden_layers": num_layers,
        "intermediate_size": inner,
        "rms_norm_eps": 1e-5,
    }
    hidden = config["hidden_size"]
    noise = (0.02 * torch.randn(1 << 28, generator=torch.Generator().manual_seed(0))).bfloat16()

    def random(rows: int, columns: int) -> torch.Tensor:
        return noise[: rows * columns].view(rows, columns)

    folder.mkdir(parents=True)
    with ShardWriter(folder) as writer:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            writer.add(name, random(config["vocab_size"], hidden))
        writer.add("model.norm.weight", torch.ones(hidden).bfloat16())
        for layer in range(num_layers):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{prefix}{name}.weight", torch.ones(hidden).bfloat16())
            for name in "qkvo":
                writer.add(f"{prefix}self_attn.{name}_proj.weight", random(hidden, hidden))
            for name in ("gate", "up"):
                writer.add(f"{prefix}mlp.{name}_proj.weight", random(inner, hidden))
            writer.add(f"{prefix}mlp.down_proj.weight", random(hidden, inner))
        writer.finish(config)


def run(code: str, source: Path, out: Path) -> tuple[float, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", code, str(source), str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = map(float, printed.split())
    shutil.rmtree(out)
    return seconds, peak


def main(work: Path) -> None:
    rows = []
    for num_layers, repeats in ((8, 3), (16, 2), (32, 2)):
        source = work / f"llama-2-7b-{num_layers}"
        make_model(source, num_layers)
        size = sum(file.stat().st_size for file in source.iterdir())
        copies, conversions = [], []
        for _ in range(repeats):
            copies.append(run(COPY, source, work / "copy"))
            conversions.append(run(CONVERT, source, work / "moe"))
        shutil.rmtree(source)
        copy_s = statistics.median(seconds for seconds, _ in copies)
        convert_s = statistics.median(seconds for seconds, _ in conversions)
        rows.append(
            {
                "layers": str(num_layers),
                "GB": f"{size / 1e9:.2f}",
                "copy, s": f"{copy_s:.1f}",
                "convert, s": f"{convert_s:.1f}",
                "of copying's speed": f"{copy_s / convert_s:.2f}",
                "peak GiB": f"{max(peak for _, peak in conversions) / 2**30:.2f}",
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    publish_table(rows_of(rows), RESULT, PAGE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
