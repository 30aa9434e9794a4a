"""Checks of a run before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moefy.checkpoint.cost import ffn_shape
from moefy.data.strategies import find_strategy
from moefy.errors import UsageError
from moefy.training.recipe import Parallel, TrainRecipe


def check_processes(parallel: Parallel, size: int) -> tuple[int, int]:
    """Return how many processes share one copy of the weights, and how many read a batch.

    Raises:
        UsageError: `size` processes are not what the recipe asks for, or cannot do it.
    """
    fixed = parallel.replicate * parallel.tensor
    shard = parallel.shard or max(1, size // fixed)
    if shard * fixed != size:
        asked = parallel.model_dump(include={"shard", "replicate", "tensor"})
        factors = " × ".join(f"{name} {count}" for name, count in asked.items() if count)
        raise UsageError(
            f"the recipe's parallel ({factors}) does not make {size} process{'es' * (size > 1)}: "
            f"start {shard * fixed} with torchrun --nproc-per-node {shard * fixed} -m moefy train "
            "…, or change parallel"
        )
    if parallel.cpu_offload and shard * parallel.replicate == 1:
        raise UsageError(
            "parallel.cpu_offload is FSDP's, which one copy of the weights in one process does not "
            "have: start more processes with torchrun, or leave it out"
        )
    expert = parallel.expert
    # experts are spread inside one copy of the weights, over whole groups of tensor parallelism
    if (shard * parallel.tensor) % expert or (expert > 1 and expert % parallel.tensor):
        raise UsageError(
            f"expert {expert} is impossible with shard {shard} and tensor {parallel.tensor}: it "
            "must be a multiple of tensor and divide shard × tensor"
        )
    return shard, size // parallel.tensor


def check_run(recipe: TrainRecipe, num_data: int) -> None:
    """Refuse a recipe that cannot run, whatever the model.

    Raises:
        UsageError: `num_data` processes cannot divide a batch, or the mixture follows the losses of
            the dense model and that is not named.
    """
    at_once = num_data * recipe.micro_batch_size
    if recipe.global_batch_size % at_once:
        raise UsageError(
            f"global_batch_size {recipe.global_batch_size} must be a multiple of {at_once}: "
            f"{num_data} processes with micro_batch_size {recipe.micro_batch_size}"
        )
    if is_dynamic(recipe) and recipe.reference_losses == "dense" and recipe.teacher is None:
        raise UsageError(
            f"{recipe.mixture} compares the losses with the dense model's: name it with --teacher "
            "(with distillation.alpha 0 it is used for nothing else), or set reference_losses to "
            "published or to a file"
        )


def is_dynamic(recipe: TrainRecipe) -> bool:
    """Whether the weights of the recipe's mixture follow the losses."""
    return isinstance(recipe.mixture, str) and find_strategy(recipe.mixture).is_dynamic


def check_context(config: Mapping[str, Any], sequence_length: int, name: str) -> None:
    """Raise UsageError for sequences that are longer than the context of the model `name`."""
    context = config.get("max_position_embeddings")
    if context and sequence_length > context:
        raise UsageError(
            f"--sequence-length {sequence_length} is longer than the context of {name}, "
            f"{context} tokens: lower it"
        )


def check_model(config: Mapping[str, Any], recipe: TrainRecipe, name: str) -> None:
    """Raise UsageError for a model with too short a context, or experts that cannot be spread."""
    check_context(config, recipe.sequence_length, name)
    experts, expert = ffn_shape(config).experts, recipe.parallel.expert
    if expert > 1 and (not experts or experts % expert):
        raise UsageError(
            f"expert {expert}: the {experts} routed experts of {name} cannot be spread evenly over "
            f"{expert} processes"
        )
