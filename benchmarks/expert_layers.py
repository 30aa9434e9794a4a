"""Implementations of a layer's experts in training: docs/performance.md, "The experts".

    python benchmarks/expert_layers.py [--repeats 9]

One layer of the shapes of SmolLM2-135M and Llama-3.2-1B, forward and backward on 512 tokens, half
of the slices chosen, beside the dense FFN of the active size: processor time, the median of runs
that alternate between the implementations, and what a pass of 512 tokens keeps in all layers.
Writes docs/performance/expert-layers.csv and the table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from publish import publish_table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moefy.checkpoint.cost import config_of, split_config
from moefy.checkpoint.expert_layers import register

DOCS = Path(__file__).resolve().parent.parent / "docs"
IMPLEMENTATIONS = ("eager", "grouped_mm", "lean")
DENSE = "dense, active size"
SHAPES = ("smollm2-135m", "llama-3.2-1b")
TOKENS = 512
_LOGITS_BYTES = 3 * (64 << 20)  # chunks of them, see evaluation/output_loss.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    register()
    of_dense = [f"{precision}, speed over dense" for precision in ("float32", "bfloat16")]
    rows = [["shape", "slices", "implementation", "float32, ms", "bfloat16, ms", *of_dense]]
    rows[0].append("kept by a pass, MiB")
    for shape in SHAPES:
        config = config_of(shape)
        for experts in (8, 16, 64):
            times = [
                _times(config, experts, precision, repeats)
                for precision in (torch.float32, torch.bfloat16)
            ]
            for name in (DENSE, *IMPLEMENTATIONS):
                kept = "–"
                if name in IMPLEMENTATIONS[1:]:  # eager's loop needs to know who chose whom
                    kept = f"{_kept_bytes(config, experts, name) / 2**20:.0f}"
                cells = [f"{1000 * found[name]:.0f}" for found in times]
                cells += [f"{found[DENSE] / found[name]:.2f}" for found in times]
                rows.append([shape, f"{experts // 2}/{experts}", name, *cells, kept])
                print(*rows[-1], sep="\t", flush=True)
    publish_table(rows, DOCS / "performance/expert-layers.csv", DOCS / "performance.md")


def _kept_bytes(dense: dict[str, Any], experts: int, implementation: str) -> int:
    """Return the bytes that a pass of a model's split keeps for its backward pass, and its loss."""
    config = split_config(dense, experts=experts, active=experts // 2)
    shape = {key: value for key, value in config.items() if key != "model_type"}
    kept: dict[int, tuple[torch.Tensor, int]] = {}  # holds the tensors: storages are used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with FakeTensorMode():
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **shape), dtype=torch.bfloat16
        ).train()
        network.set_experts_implementation(implementation)
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = network.model(tokens, use_cache=False).last_hidden_state
        hidden.sum().backward()
    return sum(size for _, size in kept.values()) + _LOGITS_BYTES


def _times(
    dense: dict[str, Any], experts: int, precision: torch.dtype, repeats: int
) -> dict[str, float]:
    hidden, neurons = dense["hidden_size"], dense["intermediate_size"]
    layers = {name: _layer(hidden, neurons // experts, experts, name) for name in IMPLEMENTATIONS}
    layers[DENSE] = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=neurons // 2))
    x = torch.randn(TOKENS, hidden, requires_grad=True)
    chosen = torch.stack([torch.randperm(experts)[: experts // 2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, experts // 2, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repeats):
        for name, layer in layers.items():
            inputs = [x] if name == DENSE else [x, chosen, weights]
            started = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                out = layer(*inputs)
            out.float().sum().backward()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _layer(hidden: int, size: int, experts: int, implementation: str) -> Any:
    config = MixtralConfig(hidden_size=hidden, intermediate_size=size, num_local_experts=experts)
    config._experts_implementation = implementation
    layer = MixtralExperts(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return layer


if __name__ == "__main__":
    main()
