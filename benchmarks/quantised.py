"""Conversion of quantised sources against the plain one of the same weights: docs/performance.md.

    python benchmarks/quantised.py WORK [--write]    # 3 GB of disk, about 5 minutes

A random LLaMA of 143 million parameters, bfloat16, in each form, split by `--repair none`, one
thread, in one process; forms and the plain one alternate. *First*: with an empty cache,
*again*: with the cache that the first one left. Processor time is that of all threads.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from publish import publish_table, rows_of
from tests.parity import test_quantised_source as encoders

import moefy
from moefy.recipe import LLAMA_MOE
from moefy.report.tables import markdown

DOCS = Path(__file__).parents[1] / "docs"
HIDDEN, INNER, LAYERS, VOCAB = 1024, 4096, 8, 4096
FORMS = {
    "plain bfloat16": None,
    "gptq, 4 bits": "gptq",
    "gptq, order of activations": "gptq, order of activations",
    "awq": "awq",
    "fp8, blocks": "fp8",
    "mxfp4": "mxfp4",
    "bitsandbytes, nf4": "bitsandbytes, 4 bits",
    "bitsandbytes, nf4, nested": "bitsandbytes, nested",
    "bitsandbytes, 8 bits": "bitsandbytes, 8 bits",
    "compressed-tensors, int4": "compressed int4",
    "compressed-tensors, float8": "compressed float8",
}


def make(folder: Path, form: str | None) -> None:
    """Write the model; all layers have the same weights."""
    random = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (HIDDEN, INNER)
    layer: dict[str, torch.Tensor] = {}
    settings = {}
    for name, shape in shapes.items():
        weight = 0.02 * torch.randn(shape, generator=random)
        parts = {"weight": weight.bfloat16()}
        if form:
            settings, encode = encoders.FORMS[form]
            parts = encode(weight.double().numpy())[0]
        layer |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[f"{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    tensors = {f"model.layers.{i}.{n}": t for i in range(LAYERS) for n, t in layer.items()}
    tensors |= {"model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (0.02 * torch.randn(VOCAB, HIDDEN, generator=random)).bfloat16()
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    config = {
        **{"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16},
        **{"vocab_size": VOCAB, "max_position_embeddings": 2048, "dtype": "bfloat16"},
        **({"quantization_config": settings} if form else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))


def seconds(source: Path, work: Path) -> tuple[float, float]:
    """Return the time of one conversion, and the processor's."""
    shutil.rmtree(work / "moe", ignore_errors=True)
    started, used = time.perf_counter(), time.process_time()
    moefy.convert(source, work / "moe", experts=8, active=4, **LLAMA_MOE | {"repair": "none"})
    return time.perf_counter() - started, time.process_time() - used


def medians(times: list[tuple[float, float]]) -> list[float]:
    return [statistics.median(each) for each in zip(*times, strict=True)]


def main(work: Path) -> None:
    os.environ["MOEFY_CACHE"] = str(work / "cache")
    torch.set_num_threads(1)
    # blocks as released models have them
    encoders.GROUP = 128
    blocks, by_row = encoders.float8((128, 128)), encoders.float8((1, INNER), "weight_scale")
    encoders.FORMS["fp8"] = ({"quant_method": "fp8", "weight_block_size": [128, 128]}, blocks)
    encoders.FORMS["compressed float8"] = ({"quant_method": "compressed-tensors"}, by_row)
    for name, form in FORMS.items():
        if not (work / name / "config.json").exists():
            make(work / name, form)
    seconds(work / "plain bfloat16", work)  # with the imports
    first: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    again: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for _ in range(3):
        for name in FORMS:
            shutil.rmtree(work / "cache", ignore_errors=True)
            first[name].append(seconds(work / name, work))
            again[name].append(seconds(work / name, work))
    rows = []
    plain = [medians(times["plain bfloat16"]) for times in (first, again)]
    for name in FORMS:
        row = {"form": name}
        for when, times, base in zip(("first", "again"), (first, again), plain, strict=True):
            wall, processor = medians(times[name])
            row[f"{when}, s"] = f"{wall:.2f}"
            row[f"{when} / plain"] = f"{wall / base[0]:.2f}"
            row[f"{when}, processor s"] = f"{processor:.2f}"
            row[f"{when} / plain, processor"] = f"{processor / base[1]:.2f}"
        rows.append(row)
    print(markdown(rows_of(rows)))
    if "--write" in sys.argv:
        publish_table(rows_of(rows), DOCS / "performance/quantised.csv", DOCS / "performance.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
