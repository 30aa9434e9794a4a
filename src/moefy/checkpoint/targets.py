"""Native MoE targets: what a converted model is written as, as data.

A target is an architecture that transformers, vLLM and llama.cpp already run; no code of moefy
travels with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NativeTarget:
    """The checkpoint layout of one MoE architecture, in the form that lies on disk.

    Attributes:
        model_type, architecture: `model_type` and `architectures[0]` in config.json.
        router: name of the router's matrix behind the layer prefix, [num_experts, hidden_size].
        gate, up, down: names of an expert's matrices behind the layer prefix, with `{expert}`;
            shapes as in the dense family with the expert's size for intermediate_size. Without
            `{expert}` the tensors of all experts are one, [num_experts, …]; where `gate` and `up`
            are the same name, gate lies above up.
        shared_gate_up, shared_down: names of the shared expert's matrices, or None if the
            architecture has none.
        num_experts_key: config key of the number of routed experts.
        settings: config values that make the target compute what the conversion relies on.
    """

    model_type: str
    architecture: str
    router: str
    gate: str
    up: str
    down: str
    shared_gate_up: str | None
    shared_down: str | None
    num_experts_key: str
    settings: Mapping[str, Any]


MIXTRAL = NativeTarget(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    router="block_sparse_moe.gate.weight",
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
    shared_gate_up=None,
    shared_down=None,
    num_experts_key="num_local_experts",
    settings={
        "sliding_window": None,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    },
)

GRANITEMOESHARED = NativeTarget(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    router="block_sparse_moe.router.layer.weight",
    gate="block_sparse_moe.input_linear.weight",
    up="block_sparse_moe.input_linear.weight",
    down="block_sparse_moe.output_linear.weight",
    shared_gate_up="shared_mlp.input_linear.weight",
    shared_down="shared_mlp.output_linear.weight",
    num_experts_key="num_local_experts",
    settings={
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    },
)

TARGETS = {target.model_type: target for target in (MIXTRAL, GRANITEMOESHARED)}


def native_target(shared: int) -> NativeTarget:
    """Return the architecture for a number of shared slices: Mixtral has none."""
    return GRANITEMOESHARED if shared else MIXTRAL


_COPIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
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
_DENSE_DEFAULTS = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a config in transformers 5's form.

    Older files spell them as `rope_theta` beside `rope_scaling`, newer ones as `rope_parameters`.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    return parameters


def target_config(
    target: NativeTarget,
    dense: Mapping[str, Any],
    *,
    experts: int,
    active: int,
    dtype: str,
    shared: int = 0,
) -> dict[str, Any]:
    """Return the config.json of a converted model.

    The rotary settings are written in both spellings: transformers 5 reads `rope_parameters`,
    vLLM, llama.cpp and mistral.rs read `rope_theta` and `rope_scaling`. Where an expert's rows are
    not a multiple of 16 bytes, which torch's grouped matrix product refuses, the config tells
    transformers to run the experts one by one.

    Args:
        target: the architecture to write.
        dense: the dense model's config.json.
        experts: E, slices that the dense FFN is cut into, the shared ones included.
        active: k, slices that run for a token, the shared ones included.
        shared: slices that always run.
        dtype: of the stored weights ("float32", "bfloat16", "float16").
    """
    rope = rope_parameters(dense)
    heads = dense["num_attention_heads"]
    config: dict[str, Any] = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        **_DENSE_DEFAULTS,
        **{key: dense[key] for key in _COPIED if key in dense},
        "num_key_value_heads": dense.get("num_key_value_heads") or heads,
        "head_dim": dense.get("head_dim") or dense["hidden_size"] // heads,
        "intermediate_size": dense["intermediate_size"] // experts,
        target.num_experts_key: experts - shared,
        "num_experts_per_tok": active - shared,
        **target.settings,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if target.shared_down:
        config["shared_intermediate_size"] = shared * config["intermediate_size"]
        config["attention_multiplier"] = config["head_dim"] ** -0.5
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if config["intermediate_size"] % 8 or config["hidden_size"] % 8:
        config["experts_implementation"] = "eager"
    return config
