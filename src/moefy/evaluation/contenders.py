"""The models whose speed is compared, and those with random weights beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.cost import ffn_shape, has_qk_norm
from moefy.checkpoint.reader import read_config
from moefy.hardware import device

_SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
_NARROW_HIDDEN = 64
_NARROW_WIDTHS = {
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "vocab_size": 256,
}


@dataclass(frozen=True)
class Contender:
    """A model to measure.

    Attributes:
        name: to show.
        config: its config.json.
        folder: where it lies; None for random weights.
        same_size: index of the dense model of its active size among the contenders, if any.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path | None
    same_size: int | None


def contenders_of(folders: list[Path], names: list[str]) -> list[Contender]:
    """Return the models, and before the first of every active size a dense model of that size.

    Raises:
        ArchitectureError: a model that `cost` cannot count.
    """
    configs = [read_config(folder) for folder in folders]
    dense = [config for config in configs if not ffn_shape(config).experts]
    sizes = {ffn_shape(config).running for config in configs if ffn_shape(config).experts}
    found: list[Contender] = []
    places: dict[int, int] = {}
    for name, folder, config in zip(names, folders, configs, strict=True):
        shape = ffn_shape(config)
        if shape.experts and shape.running not in places:
            label = "dense of the active size"
            if len(sizes) > 1:
                label += f" ({shape.running} neurons)"
            places[shape.running] = len(found)
            found.append(Contender(label, dense_of_active_size(config, dense), None, len(found)))
        same_size = places[shape.running] if shape.experts else None
        found.append(Contender(name, config, folder, same_size))
    if len(places) == 1:  # then the dense model is compared with it too
        (place,) = places.values()
        found = [Contender(c.name, c.config, c.folder, place) for c in found]
    return found


def dense_of_active_size(
    config: Mapping[str, Any], dense: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the config of a dense model with as many neurons as run per token.

    Args:
        config: of a converted model.
        dense: configs of dense models; the first of the same shape gives the family.
    """
    neurons = ffn_shape(config).running
    alike = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for candidate in dense:
        if all(candidate[key] == config[key] for key in alike):
            return {**candidate, "intermediate_size": neurons}
    made = {key: config[key] for key in _SHAPE if config.get(key) is not None}
    made["model_type"] = "qwen3" if has_qk_norm(config) else "llama"
    made["architectures"] = [f"{made['model_type'].capitalize()}ForCausalLM"]
    made["attention_bias"] = bool(config.get("attention_bias"))
    return {**made, "intermediate_size": neurons}


def narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model that runs the same operations on matrices of about 64 columns.

    Layers, heads, experts and active experts stay; what it takes is the cost of having that many
    operations.
    """
    small = {key: value for key, value in config.items() if key != "rope_scaling"}
    small |= {key: width for key, width in _NARROW_WIDTHS.items() if key in config}
    unit = math.lcm(8, config["num_attention_heads"])  # transformers wants a multiple of the heads
    small["hidden_size"] = -(-_NARROW_HIDDEN // unit) * unit
    small |= {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return {**small, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def random_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a model with transformers' initial weights, in evaluation mode, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(made, dtype=dtype).eval().to(device())
