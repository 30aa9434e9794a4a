"""Checks and loads student and teacher: device, precision, frozen parts and adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.expert_layers import register
from moefy.checkpoint.load import load_model
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.targets import TARGETS
from moefy.errors import UsageError
from moefy.experts.routers import routers_of
from moefy.hardware import device
from moefy.training.processes import Processes
from moefy.training.recipe import Lora, TrainRecipe, TuneRecipe

# names of each part's parameters, in all families and targets
_PARTS = {
    "embeddings": r"(embed_tokens|lm_head)\.",
    "attention": r"\.(self_attn|linear_attn|conv)\.(?!.*norm)",
    "norms": r"norm\.weight$",
    "experts": r"\.experts\.|\.mlp\.(gate|up|gate_up|down)_proj\.|\.feed_forward\.w",
    "shared-experts": r"\.(shared_mlp|shared_experts?)\.",
    "routers": r"\.(router|gate)\.",
}


def check_context(config: Mapping[str, Any], sequence_length: int, name: str) -> None:
    """Raise UsageError for sequences that are longer than the context of the model `name`."""
    context = config.get("max_position_embeddings")
    if context and sequence_length > context:
        raise UsageError(
            f"--sequence-length {sequence_length} is longer than the context of {name}, "
            f"{context} tokens: lower it"
        )


def check_model(config: Mapping[str, Any], recipe: TrainRecipe | TuneRecipe, name: str) -> None:
    """Raise UsageError for a model with too short a context, or experts that cannot be spread."""
    check_context(config, recipe.sequence_length, name)
    experts, expert = ffn_shape(config).experts, recipe.parallel.expert
    if expert > 1 and (not experts or experts % expert):
        raise UsageError(
            f"expert {expert}: the {experts} routed experts of {name} cannot be spread evenly over "
            f"{expert} processes"
        )


def load_student(source: Path, recipe: TrainRecipe, processes: Processes) -> Any:
    """Load the model that is trained, with float32 weights, and freeze the recipe's parts."""
    register()
    options: dict[str, Any] = {}
    if ffn_shape(read_config(source)).experts:
        options["experts_implementation"] = recipe.experts_implementation
    network = _load(source, torch.float32, recipe, processes.sizes, **options).train()
    if recipe.lora:
        network = add_adapters(network, recipe.lora, recipe.seed % 2**63, processes)
    named, target = list(network.named_parameters()), TARGETS.get(network.config.model_type)
    # a converted model has attention sinks because its architecture does, so low that they do
    # nothing: they must stay there
    fixed = [p for name, p in named if target and target.sinks and name.endswith(target.sinks)]
    for part in recipe.frozen:
        found = [p for name, p in named if re.search(_PARTS[part], name)]
        if not found:
            raise UsageError(f"frozen {part}: a {network.config.model_type} model has none")
        fixed += found
    for parameter in fixed:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise UsageError(f"frozen {', '.join(recipe.frozen)}: nothing is left to learn")
    if recipe.gradient_checkpointing:
        # transformers 5.23 gave it a new name and warns of the old one
        new = getattr(network, "activation_checkpointing_enable", None)
        (new or network.gradient_checkpointing_enable)({"use_reentrant": False})
    if recipe.compile:
        for layer in network.model.layers:
            layer.compile()
    return network


def load_teacher(source: Path, recipe: TrainRecipe, processes: Processes) -> Any:
    """Load the dense parent, frozen, in the precision of the products."""
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    sizes = processes.sizes and processes.sizes | {"ep_size": 1}  # no experts to spread
    return _load(source, dtype, recipe, sizes).requires_grad_(False)


def _load(
    source: Path, dtype: torch.dtype, recipe: TrainRecipe, sizes: dict[str, Any] | None, **more: Any
) -> Any:
    """Load a model onto this process's device, or this process's share of it."""
    if not sizes:
        return load_model(source, dtype=dtype, **more).to(device())
    from transformers.distributed import DistributedConfig

    is_mixed = recipe.precision == "bfloat16" and device().type == "cuda"
    config = DistributedConfig(**sizes, fsdp_mixed_precision=is_mixed)
    return load_model(source, dtype=dtype, distributed_config=config, **more)


def add_adapters(network: Any, lora: Lora, seed: int, processes: Processes) -> Any:
    """Return the model with low-rank adapters beside its matrices; only they are trained.

    Source: LoRA (arXiv 2106.09685): W + (alpha / rank)·B·A with A [rank, inputs] random and
    B [outputs, rank] zero. The experts of a layer are one tensor in memory; peft gives each expert
    matrices of its own.
    """
    if processes.size > 1:
        raise UsageError(
            "lora runs in one process: its adapters are not sharded; start without torchrun"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("lora needs the peft package: pip install 'moefy[lora]'") from None
    modules, tensors = ["q_proj", "k_proj", "v_proj", "o_proj"], list[str]()
    if lora.modules == "all":
        modules, tensors = _all_matrices(network)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=modules,
        target_parameters=tensors or None,
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)  # of the adapters, so that a run begun again is the same
            # peft asks transformers 5 for a name that is to go in 6
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            network = inject_adapter_in_model(config, network)
    except ValueError as error:
        raise UsageError(f"lora.modules {lora.modules}: {error}") from error
    return network


def _all_matrices(network: Any) -> tuple[list[str], list[str]]:
    """Return the names of all matrices of the layers but the routers, as modules and as tensors."""
    routers = {id(part) for router in routers_of(network) for part in router.modules()}
    linear = [
        (f"model.{name}", module)
        for name, module in network.model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in routers
    ]
    # peft takes `gate_proj` and its like in a GLM for old names of the fused experts
    shared = [f"{name}.weight" for name, _ in linear if ".shared_experts." in name]
    fused = [f"model.{name}" for name, p in network.model.named_parameters() if p.ndim == 3]
    return [name for name, _ in linear if ".shared_experts." not in name], shared + fused


def merge_adapters(network: Any) -> None:
    """Add the adapters to the weights that they adapt, and remove them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, module in reversed(found):  # the inner ones first
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module.get_base_layer())
