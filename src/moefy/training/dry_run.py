"""Checks a run and counts what it takes, without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moefy.checkpoint.cost import config_of, cost, split_config
from moefy.errors import UsageError
from moefy.hardware import training_precision
from moefy.training.models import check_model, prepare_student
from moefy.training.objective import Objective
from moefy.training.optimizer import build_optimizer
from moefy.training.processes import Processes, check_processes
from moefy.training.recipe import TrainRecipe, TrainSettings
from moefy.training.step import TRAINED_PASSES

_OPTIMIZER_BYTES = 16  # of a weight that learns: itself, its gradient, Adam's two moments


@dataclass(frozen=True)
class DryRun:
    """The size of a run; activations, which the sizes of a pass decide, are not counted."""

    steps: int  # of the optimizer
    tokens_per_step: int  # of all processes
    processes: int
    total_params: int
    active_params: int  # per token
    learned_params: int  # not frozen
    passes_per_step: int  # forward and backward, of one process
    state_bytes: int  # weights, gradients, optimizer and the teacher's weights, in one process
    total_flops: int  # of the whole run, the teacher's forward passes too


def dry_run(
    model: str | Path,
    *,
    processes: int,
    recipe: TrainRecipe | str | Path | None = None,
    **settings: Unpack[TrainSettings],
) -> DryRun:
    """Check a recipe against a model and a number of processes, and count the run's cost.

    Args:
        model: a converted or dense model folder, its config.json, or a shape that `inspect` knows,
            also split: `llama-2-7b:4/16`.
        processes: that torchrun would start.
        recipe: a `TrainRecipe` or a YAML file with its keys.
        **settings: single `TrainRecipe` keys; they override the recipe.

    Raises:
        UsageError: the recipe cannot run like this.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    choice, config = TrainRecipe.build(recipe, **settings), _config_of(model)
    shard, num_data = check_processes(choice, processes)
    choice.check_reference()
    check_model(config, choice, str(model))
    if choice.lora:
        raise UsageError("a dry run does not count lora's adapters: leave lora out")
    shape = {key: value for key, value in config.items() if key != "model_type"}
    with FakeTensorMode():  # tensors that have a shape and no numbers
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **shape), dtype=torch.bfloat16
        )
        prepare_student(network, choice)
        objective = Objective(network, None, choice, Processes(size=processes))
        build_optimizer(network, objective.noise, choice)
    total = sum(p.numel() for p in network.parameters())
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    counted = cost(config, context=choice.sequence_length)
    flops_per_token = TRAINED_PASSES * counted.flops_per_token
    state_bytes = _OPTIMIZER_BYTES * learned + 4 * (total - learned)
    if choice.distils:
        teacher = cost(_config_of(choice.teacher or ""), context=choice.sequence_length)
        is_short = training_precision(choice.precision) == "bfloat16"
        state_bytes += (2 if is_short else 4) * teacher.total_params
        flops_per_token += teacher.flops_per_token
    return DryRun(
        steps=choice.num_steps,
        tokens_per_step=choice.tokens_per_step,
        processes=processes,
        total_params=total,
        active_params=counted.active_params,
        learned_params=learned,
        passes_per_step=choice.global_batch_size // num_data // choice.micro_batch_size,
        state_bytes=state_bytes // (shard * choice.parallel.tensor),
        total_flops=choice.num_steps * choice.tokens_per_step * flops_per_token,
    )


def _config_of(model: str | Path) -> dict[str, Any]:
    found = re.fullmatch(r"(.+):(\d+)/(\d+)", str(model))
    if found is None:
        return config_of(model)
    name, active, experts = found.groups()
    return split_config(config_of(name), experts=int(experts), active=int(active))
