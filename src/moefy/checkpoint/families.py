"""Dense families: what a source's tensors are called, as data.

A family is a table. A tensor that no rule maps stops the conversion, so nothing is dropped in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefy.errors import ArchitectureError


@dataclass(frozen=True)
class DenseFamily:
    """The checkpoint layout of one dense architecture.

    Attributes:
        model_type: `model_type` in config.json.
        layer: prefix of a layer's tensors, with `{layer}`.
        gate, up, down: names of the three FFN matrices behind that prefix. `gate` and `up` have
            shape [intermediate_size, hidden_size], `down` [hidden_size, intermediate_size].
        ffn_norm: name of the RMSNorm gain in front of the FFN, shape [hidden_size].
        layer_tensors: every other tensor of a layer.
        model_tensors: every tensor outside the layers.
        optional: tensors that some files carry and nothing needs.
        fixed: config values that the conversion relies on, with their defaults.
    """

    model_type: str
    layer: str
    gate: str
    up: str
    down: str
    ffn_norm: str
    layer_tensors: tuple[str, ...]
    model_tensors: tuple[str, ...]
    optional: tuple[str, ...]
    fixed: Mapping[str, Any]


LLAMA = DenseFamily(
    model_type="llama",
    layer="model.layers.{layer}.",
    gate="mlp.gate_proj.weight",
    up="mlp.up_proj.weight",
    down="mlp.down_proj.weight",
    ffn_norm="post_attention_layernorm.weight",
    layer_tensors=(
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
    ),
    model_tensors=("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    optional=("self_attn.rotary_emb.inv_freq",),
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)

FAMILIES = {family.model_type: family for family in (LLAMA,)}


def dense_family(config: Mapping[str, Any], source: str) -> DenseFamily:
    """Return the family of a dense config.json.

    Args:
        config: the parsed config.json.
        source: the name of the source, for messages.

    Raises:
        ArchitectureError: the architecture is unknown, already quantised, or has a setting that
            the conversion would change.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ArchitectureError(
            f"{source} has the architecture {model_type!r}; moefy converts dense "
            f"{', '.join(sorted(FAMILIES))} models (LLaMA, SmolLM2, TinyLlama and their kin)"
        )
    family = FAMILIES[model_type]
    for key, value in family.fixed.items():
        found = config.get(key, value)
        if found != value:
            raise ArchitectureError(
                f"{source} sets {key} = {found!r}; the native target can only express {value!r}"
            )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ArchitectureError(
            f"{source} is quantised ({method}): convert the unquantised checkpoint, then quantise"
        )
    return family
