"""What a model is, and what it and its splits cost, from config.json alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from moefy.checkpoint.families import FAMILIES, dense_config
from moefy.checkpoint.meaning import meaning_of
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.skeleton import skeleton_of
from moefy.checkpoint.targets import (
    TARGETS,
    check_known,
    expressible,
    native_target,
    pruned_config,
    target_config,
)
from moefy.errors import CheckpointError, UsageError
from moefy.split import Split

SHAPES: dict[str, dict[str, Any]] = yaml.safe_load(
    (files("moefy.checkpoint") / "shapes.yaml").read_text()
)
"""Shapes that `inspect` knows by name, so that it needs no file and no network."""


@dataclass(frozen=True)
class Cost:
    """What one model costs."""

    experts: int  # routed experts per layer, 0 for a dense model
    active_experts: int  # routed experts that run for one token
    total_params: int  # tied embeddings count once
    active_params: int  # all but the experts that a token is not routed to, as LLaMA-MoE counts
    flops_per_token: int  # forward, averaged over the positions of a sequence of `context` tokens
    context: int


@dataclass(frozen=True)
class FfnShape:
    """The FFN of one layer; sizes are neurons."""

    experts: int  # routed, 0 for a dense model
    active: int  # routed experts that run for one token
    size: int  # of one expert, or of the dense FFN
    shared_size: int  # of the expert that always runs

    @property
    def running(self) -> int:
        """Neurons that run for one token."""
        return self.shared_size + max(self.active, 1) * self.size


def ffn_shape(config: Mapping[str, Any]) -> FfnShape:
    """Read the FFN's shape from config.json; an ArchitectureError for one without a table here."""
    model_type = config.get("model_type")
    check_known(model_type, "config.json")
    if model_type in TARGETS:
        target = TARGETS[model_type]
        size, shared_size = config[target.expert_size_key], 0
        if target.shared_down:
            shared_size = config[target.shared_key] if target.shared_key else 1
            shared_size *= size if target.shared_in_slices else 1
        experts, active = config[target.num_experts_key], config[target.active_key]
        return FfnShape(int(experts), int(active), size, shared_size)
    return FfnShape(0, 0, config["intermediate_size"], 0)


def cost(config: Mapping[str, Any], *, context: int = 512) -> Cost:
    """Count a dense or converted model.

    FLOPs are those of the matrix products, two per weight that a token meets (embedding look-up,
    norms and activation functions are left out), plus scores and values of the layers with
    attention, 4·n_heads·head_dim·(context + 1)/2 each: the causal mean over positions.

    Args:
        config: config.json of a LLaMA or of a native target.
        context: sequence length for attention's share.

    Raises:
        ArchitectureError: the architecture has no table here.
    """
    shape = ffn_shape(config)
    skeleton = skeleton_of(meaning_of(config, "config.json"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    resting = max(shape.experts, 1) - max(shape.active, 1)  # FFNs that a token does not meet
    one = 3 * hidden * shape.size
    total = sum(map(math.prod, skeleton.outside.values()))
    # every token meets the output matrix, even where it is the embedding, which is looked up
    met, attended = config["vocab_size"] * hidden, 0
    for kind, count in Counter(skeleton.kinds).items():
        shapes = skeleton.shapes(skeleton.kinds.index(kind))
        matrices = [name for name, size in shapes.items() if len(size) > 1]
        total += count * sum(map(math.prod, shapes.values()))
        met += count * (sum(math.prod(shapes[name]) for name in matrices) - resting * one)
        if any("self_attn" in name for name in matrices):
            attended += count * 2 * heads * head_dim * (context + 1)
    resting *= one * len(skeleton.kinds)
    return Cost(
        experts=shape.experts,
        active_experts=shape.active,
        total_params=total,
        active_params=total - resting,
        flops_per_token=2 * met + attended,
        context=context,
    )


@dataclass(frozen=True)
class Inspection:
    """A model's config.json, its cost and those of its splits."""

    name: str
    config: dict[str, Any]
    costs: dict[str, Cost]  # "dense" and "k/E", or a converted model's own "k/E" alone


def inspect(
    source: str | Path,
    *,
    experts: int | None = None,
    active: int | None = None,
    context: int | None = None,
) -> Inspection:
    """Count parameters and FLOPs of a model and of its Mixture-of-Experts splits.

    Reads config.json only. A dense model is shown beside the given split, or beside the paper's
    three (2/16, 4/16, 2/8), 8/16 and what `convert` makes; a converted model is shown alone.

    Args:
        source: a model folder, a config.json, or a name in `SHAPES`.
        experts: E of a split; with `active` alone, as many as `convert` makes.
        active: k of a split; with `experts` alone, half of it.
        context: sequence length for attention's FLOPs; default 4096 or the model's own if smaller.

    Raises:
        UsageError: no such model, or an impossible split.
    """
    config = config_of(source)
    asked = experts is not None or active is not None
    length = context or min(4096, config.get("max_position_embeddings") or 4096)
    counted = cost(config, context=length)
    if config["model_type"] not in FAMILIES:
        if asked:
            raise UsageError(
                f"{source} is already split; --experts and --active need a dense model"
            )
        label = f"{counted.active_experts}/{counted.experts}"
        return Inspection(str(source), config, {label: counted})

    # the paper's three, half of 16, and what `convert` makes
    usual = [Split(16, 2), Split(16, 4), Split(8, 2), Split(16, 8)]
    splits = [*usual, Split.of(config["intermediate_size"])]
    if asked:
        splits = [Split.of(config["intermediate_size"], experts, active, 0)]
    costs = {"dense": counted}
    for each in splits:
        made = split_config(config, experts=each.experts, active=each.active, name=str(source))
        costs[f"{each.active}/{each.experts}"] = cost(made, context=length)
    return Inspection(str(source), config, costs)


def config_of(source: str | Path) -> dict[str, Any]:
    """Return the config.json of a model folder, a file, or a name in `SHAPES`."""
    path = Path(source).expanduser()
    if path.exists():
        return read_config(path)
    if str(source) in SHAPES:
        return SHAPES[str(source)]
    raise CheckpointError(
        f"{source} does not exist; give a model folder, a config.json, or one of "
        f"{', '.join(SHAPES)}"
    )


def split_config(
    config: Mapping[str, Any],
    *,
    experts: int,
    active: int,
    shared: int | None = None,
    name: str = "the model",
) -> dict[str, Any]:
    """Return the config of a split, or of a smaller dense model where all active slices are shared.

    The counts are those of `Split`; `shared` None is 0, or 1 where every target has a shared
    expert.
    """
    split = Split(experts, active, shared or 0)
    split.check(config["intermediate_size"])
    if shared is None:
        return split_within(config, split, name)[1]
    dense = dense_config(config, name)
    if not split.chosen:
        return pruned_config(dense, split)
    return target_config(native_target(dense, split), dense, split, dtype="bfloat16")


def split_within(
    config: Mapping[str, Any], split: Split, name: str = "the model"
) -> tuple[Split, dict[str, Any]]:
    """Return a split as a target can hold it, with other shared slices if need be, and its config.

    Raises:
        UsageError: the model allows no such split.
    """
    split.check(config["intermediate_size"])
    dense = dense_config(config, name)
    if not split.chosen:
        return split, pruned_config(dense, split)
    split, target = expressible(dense, split)
    return split, target_config(target, dense, split, dtype="bfloat16")
