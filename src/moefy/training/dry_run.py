"""Checks a run and estimates its memory and FLOPs without loading weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from moefy.checkpoint.cost import config_of, cost, ffn_shape, split_config
from moefy.errors import UsageError
from moefy.experts.layers import register
from moefy.hardware import training_precision
from moefy.training.models import check_model, prepare_student
from moefy.training.objective import Objective
from moefy.training.optimizer import build_optimizer
from moefy.training.processes import Processes, check_processes
from moefy.training.recipe import TrainRecipe, TrainSettings
from moefy.training.step import TRAINED_PASSES

_OPTIMIZER_BYTES = 16  # of a weight that learns: itself, its gradient, Adam's two moments
_CHUNK_BYTES = 3 * (64 << 20)  # of logits, see evaluation/output_loss.py


@dataclass(frozen=True)
class DryRun:
    """The size of a run, estimated."""

    steps: int  # of the optimizer
    tokens_per_step: int  # of all processes
    processes: int
    total_params: int
    active_params: int  # per token
    learned_params: int  # not frozen
    passes_per_step: int  # forward and backward, of one process
    state_bytes: int  # weights, gradients and optimizer of one process
    activation_bytes: int  # what one pass keeps for its backward pass, and chunks of logits
    teacher_bytes: int  # the frozen parent's weights in one process; 0 without distillation
    total_flops: int  # of the whole run, the teacher's forward passes too


def dry_run(
    model: str | Path,
    *,
    processes: int,
    recipe: TrainRecipe | str | Path | None = None,
    **settings: Unpack[TrainSettings],
) -> DryRun:
    """Check a recipe against a model and a number of processes, and estimate the run's cost.

    The model is built on the meta device, which has shapes and no numbers, and one pass runs
    forward and backward there.

    Args:
        model: a converted or dense model folder, its config.json, or a shape that `inspect` knows,
            also split: `llama-2-7b:4/16`.
        processes: that torchrun would start.
        recipe: a `TrainRecipe` or a YAML file with its keys.
        **settings: single `TrainRecipe` keys; they override the recipe.

    Raises:
        UsageError: the recipe cannot run like this.
    """
    choice = TrainRecipe.build(recipe, **settings)
    config = _config_of(model)
    shard, num_data = check_processes(choice, processes)
    choice.check_reference()
    check_model(config, choice, str(model))
    if choice.lora:
        raise UsageError(
            "a dry run does not count lora's adapters: without lora it says what is the most that "
            "the run can take"
        )
    try:
        # tensors of the meta device, which transformers knows not to ask for their values
        with FakeTensorMode():
            network = _built(config, choice)
            prepare_student(network, choice)
            objective = Objective(network, None, choice, Processes(size=processes))
            build_optimizer(network, objective.noise, choice)
            activation_bytes = _activations(network, choice) + _CHUNK_BYTES
            if choice.gradient_checkpointing:  # one layer at a time is computed again
                layer = _built({**config, "num_hidden_layers": 1}, choice)
                activation_bytes += _activations(layer, choice)
    except DynamicOutputShapeException as error:
        # which experts a token chooses needs numbers
        raise UsageError(
            "a dry run cannot follow experts that run one by one, as with experts_implementation "
            "eager, or in slices whose size is no multiple of 8: try it with the nearest split, "
            "and experts_implementation lean"
        ) from error
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    held = _OPTIMIZER_BYTES * learned + 4 * (total - learned)
    counted = cost(config, context=choice.sequence_length)
    flops_per_token = TRAINED_PASSES * counted.flops_per_token
    teacher_bytes = 0
    if choice.distils:
        assert choice.teacher is not None
        teacher = cost(_config_of(choice.teacher), context=choice.sequence_length)
        width = 2 if training_precision(choice.precision) == "bfloat16" else 4
        teacher_bytes = width * teacher.total_params // (shard * choice.parallel.tensor)
        flops_per_token += teacher.flops_per_token
    return DryRun(
        steps=choice.num_steps,
        tokens_per_step=choice.tokens_per_step,
        processes=processes,
        total_params=total,
        active_params=counted.active_params,
        learned_params=learned,
        passes_per_step=choice.global_batch_size // num_data // choice.micro_batch_size,
        state_bytes=held // (shard * choice.parallel.tensor),
        activation_bytes=activation_bytes,
        teacher_bytes=teacher_bytes,
        total_flops=choice.num_steps * choice.tokens_per_step * flops_per_token,
    )


def _config_of(model: str | Path) -> dict[str, Any]:
    found = re.fullmatch(r"(.+):(\d+)/(\d+)", str(model))
    if found is None:
        return config_of(model)
    name, active, experts = found.groups()
    return split_config(config_of(name), experts=int(experts), active=int(active))


def _built(config: Mapping[str, Any], recipe: TrainRecipe) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **settings), dtype=torch.bfloat16
    ).train()
    if ffn_shape(config).experts:
        register()
        network.set_experts_implementation(recipe.experts_implementation)
    return network


def _activations(network: Any, recipe: TrainRecipe) -> int:
    """Return the bytes that one pass keeps until its backward pass, weights not counted."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}  # holds the tensors: storages must not be reused

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    tokens = torch.zeros(recipe.micro_batch_size, recipe.sequence_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = network.model(tokens, use_cache=False).last_hidden_state
    hidden.sum().backward()
    return sum(size for _, size in kept.values())
