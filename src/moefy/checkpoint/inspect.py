"""What a model is and what its splits would cost, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.cost import Cost, cost
from moefy.checkpoint.families import FAMILIES, canonical_config, dense_family
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.target_config import pruned_config, target_config
from moefy.checkpoint.targets import native_target
from moefy.errors import ArchitectureError, CheckpointError, UsageError
from moefy.split import Split

PAPER_SPLITS = ((2, 16), (4, 16), (2, 8))
"""Active and total experts of the paper's three models."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}
"""Shapes that `inspect` knows by name, so that it needs no file and no network."""


@dataclass(frozen=True)
class Inspection:
    """A model's config.json, its cost and those of its splits.

    `costs` has the labels "dense" and "k/E", or a converted model's own "k/E" alone.
    """

    name: str
    config: dict[str, Any]
    costs: dict[str, Cost]


def inspect(
    source: str | Path,
    *,
    experts: int | None = None,
    active: int | None = None,
    context: int | None = None,
) -> Inspection:
    """Count parameters and FLOPs of a model and of its Mixture-of-Experts splits.

    Reads config.json only. A dense model is shown beside the given split, or beside the paper's
    three (2/16, 4/16, 2/8); a converted model is shown alone.

    Args:
        source: a model folder, a config.json, or a name in `SHAPES`.
        experts: E of a split, with `active`.
        active: k of a split, with `experts`.
        context: sequence length for attention's FLOPs; default 4096 or the model's own if smaller.

    Raises:
        UsageError: no such model, or an impossible split.
    """
    config = config_of(source)
    if (experts is None) != (active is None):
        raise UsageError("--experts and --active go together: give both or neither")
    length = context or min(4096, config.get("max_position_embeddings") or 4096)
    counted = cost(config, context=length)
    if config["model_type"] not in FAMILIES:
        if experts is not None:
            raise UsageError(
                f"{source} is already split; --experts and --active need a dense model"
            )
        label = f"{counted.active_experts}/{counted.experts}"
        return Inspection(str(source), config, {label: counted})

    splits = PAPER_SPLITS if experts is None or active is None else ((active, experts),)
    costs = {"dense": counted}
    for k, num_experts in splits:
        split = split_config(config, experts=num_experts, active=k, name=str(source))
        costs[f"{k}/{num_experts}"] = cost(split, context=length)
    return Inspection(str(source), config, costs)


def config_of(source: str | Path) -> dict[str, Any]:
    """Return the config.json of a model folder, a file, or a name in `SHAPES`.

    Raises:
        CheckpointError: there is none.
    """
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

    Raises:
        UsageError: an impossible split.
        ArchitectureError: a family that moefy does not convert.
    """
    split = Split(experts, active, shared or 0)
    split.check(config["intermediate_size"])
    dense = canonical_config(dense_family(dict(config), name), dict(config))
    if not split.chosen:
        return pruned_config(dense, split)
    try:
        target = native_target(dense, split)
    except ArchitectureError:
        if active < 2 or shared is not None:
            raise
        # families with a q/k norm or a bias have no target without a shared expert
        split = Split(experts, active, 1)
        target = native_target(dense, split)
    return target_config(target, dense, split, dtype="bfloat16")
