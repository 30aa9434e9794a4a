"""config.json of what a conversion writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moefy.checkpoint.families import (
    FAMILIES,
    MULTIPLIERS,
    attention_bias,
    rope_parameters,
    rotary_fraction,
    rotary_layers,
    sliding_layers,
    sliding_window,
)
from moefy.checkpoint.targets import NativeTarget
from moefy.split import Split

_COPIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def target_config(
    target: NativeTarget,
    dense: Mapping[str, Any],
    split: Split,
    *,
    dtype: str,
) -> dict[str, Any]:
    """Return the config.json of a converted model.

    Args:
        target: the architecture to write.
        dense: the dense model's canonical config.json.
        split: how every FFN is cut.
        dtype: dtype of the stored weights ("float32", "bfloat16", "float16").
    """
    rope = rope_parameters(dense)
    size = split.size(dense["intermediate_size"])
    config: dict[str, Any] = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        **{key: dense[key] for key in _COPIED if key in dense},
        **target.settings,
        target.expert_size_key: size,
        target.num_experts_key: split.routed,
        "num_experts_per_tok": split.chosen,
        # transformers 5 reads the first spelling; vLLM, llama.cpp and mistral.rs read the other,
        # and MLX wants to see `rope_scaling` even where it is null
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if not target.tied:
        config["tie_word_embeddings"] = False
    if target.shared_down:
        config[target.shared_key] = split.shared * (1 if target.shared_in_slices else size)
    if target.attention_bias != "none":
        config["attention_bias"] = attention_bias(dense) != "none"
    if isinstance(target.qk_norm, str):
        config[target.qk_norm] = FAMILIES[dense["model_type"]].qk_norm
    if target.window != "no":
        config["sliding_window"] = sliding_window(dense)
    if target.window == "by layer":
        config |= _by_layer(dense)
    if target.partial_rotary:
        config["partial_rotary_factor"] = rotary_fraction(dense)
    if target.multipliers:
        own = {"attention_multiplier": dense["head_dim"] ** -0.5}
        config |= {key: dense.get(key, own.get(key, one)) for key, one in MULTIPLIERS.items()}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    # torch's grouped matrix product refuses rows that are no multiple of 16 bytes: here
    # transformers runs the experts one by one
    if size % 8 or config["hidden_size"] % 8:
        config["experts_implementation"] = "eager"
    return config


def _by_layer(dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers slide and which rotate."""
    # llama.cpp wants a sliding layer: without a window, that of all layers is the whole context
    window, theta = sliding_window(dense), rope_parameters(dense)["rope_theta"]
    slides = sliding_layers(dense) if window else (True,) * dense["num_hidden_layers"]
    rotates = rotary_layers(dense)
    return {
        "sliding_window": window or dense["max_position_embeddings"],
        "layer_types": [("full_attention", "sliding_attention")[slide] for slide in slides],
        "layer_rope_theta": [theta if rotate else 0 for rotate in rotates],
        "no_rope_layers": [int(rotate) for rotate in rotates],  # llama.cpp's key for the same
    }


def pruned_config(dense: Mapping[str, Any], split: Split) -> dict[str, Any]:
    """Return the config.json of a dense model that keeps the shared slices of its FFNs."""
    return {
        **dense,
        "architectures": [FAMILIES[dense["model_type"]].architecture],
        "intermediate_size": split.size(dense["intermediate_size"]) * split.shared,
    }
