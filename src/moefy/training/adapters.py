"""LoRA: small matrices that learn in place of the weights, and are added to them at the end.

Only `tune` imports this module: it needs peft.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def add_adapters(network: Any, *, rank: int, alpha: float, seed: int = 0) -> Any:
    """Return the model with adapters on every matrix of its layers but the routers.

    Source: LoRA (arXiv 2106.09685): W + (alpha / rank)·B·A with A [rank, inputs] random and
    B [outputs, rank] zero. The experts of a layer are one tensor in memory; peft gives each expert
    matrices of its own.

    Args:
        network: any family or target; its own weights no longer learn.
        rank: of the adapters.
        alpha: their scale, times rank.
        seed: of A.
    """
    modules, parameters = [], []
    for name, module in network.model.named_modules():
        # peft takes `gate_proj` and its like in a GLM for old names of the fused experts
        if isinstance(module, nn.Linear) and ".shared_experts." in name:
            parameters.append(f"model.{name}.weight")
        elif isinstance(module, nn.Linear):
            modules.append(f"model.{name}")
    for name, tensor in network.model.named_parameters():
        if tensor.ndim == 3:
            parameters.append(f"model.{name}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft asks transformers 5 for a name that is to go in 6
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(network, config)


def merged(network: Any) -> Any:
    """Return the plain model with its adapters added to its weights; a plain model unchanged."""
    return network.merge_and_unload() if hasattr(network, "merge_and_unload") else network
