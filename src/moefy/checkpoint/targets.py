"""Native MoE targets: what a converted model is written as, as data.

A target is an architecture that transformers, vLLM and llama.cpp already run; no code of moefy
travels with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moefy.checkpoint.families import (
    FAMILIES,
    MULTIPLIERS,
    Bias,
    attention_bias,
    rope_parameters,
    sliding_window,
)
from moefy.errors import ArchitectureError

Score = Literal["softmax", "sigmoid"]


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
        shared_gate, shared_up, shared_down: the same of the shared expert, or None if the
            architecture has none; where there is one, it must not be empty.
        num_experts_key: config key of the number of routed experts.
        expert_size_key: config key of an expert's neurons.
        shared_key: config key of the shared expert's size.
        shared_in_slices: whether that counts slices of an expert's size, or neurons.
        score: how logits become weights. "softmax" over the chosen, "sigmoid" of each, doubled.
        selection_bias: name of a bias [num_experts] that shifts the choice alone.
        attention_bias: the most that the architecture can express; see `families.attention_bias`.
        qk_norm: config key that norms queries and keys by head, True where it always does, or None.
        tied: whether every runtime lets the output matrix be the embeddings; if not, it is written
            as a tensor of its own (vLLM 0.32 loads a tied glm4_moe without a word and then answers
            from a matrix that was never filled).
        window, multipliers: whether it can express `families.sliding_window` in every layer and
            Granite's multipliers.
        settings: config values that make the target compute what the conversion relies on.
    """

    model_type: str
    architecture: str
    router: str
    gate: str
    up: str
    down: str
    settings: Mapping[str, Any]
    shared_gate: str | None = None
    shared_up: str | None = None
    shared_down: str | None = None
    num_experts_key: str = "num_local_experts"
    expert_size_key: str = "intermediate_size"
    shared_key: str = "shared_intermediate_size"
    shared_in_slices: bool = False
    score: Score = "softmax"
    selection_bias: str | None = None
    attention_bias: Bias = "none"
    qk_norm: str | bool | None = None
    tied: bool = True
    window: bool = False
    multipliers: bool = False


MIXTRAL = NativeTarget(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    router="block_sparse_moe.gate.weight",
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
    window=True,
    settings={
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    },
)

_GRANITE: dict[str, Any] = {
    "router": "block_sparse_moe.router.layer.weight",
    "gate": "block_sparse_moe.input_linear.weight",
    "up": "block_sparse_moe.input_linear.weight",
    "down": "block_sparse_moe.output_linear.weight",
    "attention_bias": "qkvo",
    "multipliers": True,
    "settings": {"router_aux_loss_coef": 0.01, "output_router_logits": False},
}

GRANITEMOE = NativeTarget("granitemoe", "GraniteMoeForCausalLM", **_GRANITE)

GRANITEMOESHARED = NativeTarget(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    shared_gate="shared_mlp.input_linear.weight",
    shared_up="shared_mlp.input_linear.weight",
    shared_down="shared_mlp.output_linear.weight",
    **_GRANITE,
)

_EXPERTS_OF_MLP: dict[str, Any] = {
    "router": "mlp.gate.weight",
    "gate": "mlp.experts.{expert}.gate_proj.weight",
    "up": "mlp.experts.{expert}.up_proj.weight",
    "down": "mlp.experts.{expert}.down_proj.weight",
    "expert_size_key": "moe_intermediate_size",
}

QWEN3_MOE = NativeTarget(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    **_EXPERTS_OF_MLP,
    num_experts_key="num_experts",
    attention_bias="qkvo",
    qk_norm=True,
    settings={
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,  # means nothing without a window; mistral.rs wants to see it
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    },
)

GLM4_MOE = NativeTarget(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    **_EXPERTS_OF_MLP,
    shared_gate="mlp.shared_experts.gate_proj.weight",
    shared_up="mlp.shared_experts.up_proj.weight",
    shared_down="mlp.shared_experts.down_proj.weight",
    num_experts_key="n_routed_experts",
    shared_key="n_shared_experts",
    shared_in_slices=True,
    score="sigmoid",
    selection_bias="mlp.gate.e_score_correction_bias",
    attention_bias="qkv",
    qk_norm="use_qk_norm",
    tied=False,
    settings={
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "num_mtp_layers": 0,
    },
)

TARGETS = {
    target.model_type: target
    for target in (MIXTRAL, GRANITEMOESHARED, GRANITEMOE, QWEN3_MOE, GLM4_MOE)
}
"""In the order of preference."""


def check_known(model_type: Any, folder: Path) -> None:
    """Refuse a model that moefy neither converts nor writes.

    Raises:
        ArchitectureError: it is in neither table.
    """
    if model_type not in {**FAMILIES, **TARGETS}:
        known = ", ".join(sorted({**FAMILIES, **TARGETS}))
        raise ArchitectureError(f"{folder} has the architecture {model_type!r}; known: {known}")


def native_target(
    dense: Mapping[str, Any], *, shared: int, routed: int, asked: str | None = None
) -> NativeTarget:
    """Return the architecture that a split of a dense model is written as.

    That is the first of `TARGETS` that computes the same, or the one that was asked for.

    Args:
        dense: the dense model's canonical config.json.
        shared: slices that always run.
        routed: experts to choose from.
        asked: `model_type` of the wanted target.

    Raises:
        ArchitectureError: the target, or every target, computes something else.
    """
    wants = {
        target.model_type: _differences(target, dense, shared, routed)
        for target in TARGETS.values()
    }
    for name in (asked,) if asked else TARGETS:
        if not wants[name]:
            return TARGETS[name]
    if asked:
        fitting = [name for name, missing in wants.items() if not missing]
        raise ArchitectureError(
            f"{asked} cannot hold this split of a {dense['model_type']} model: "
            f"{', '.join(wants[asked])}"
            + (f"; pass --target {' or '.join(fitting)}" if fitting else "")
        )
    listed = "; ".join(f"{name}: {', '.join(missing)}" for name, missing in wants.items())
    raise ArchitectureError(
        f"no native target computes this split of a {dense['model_type']} model ({listed})"
    )


_BIASES: tuple[Bias, ...] = ("none", "qkv", "qkvo")


def _differences(
    target: NativeTarget, dense: Mapping[str, Any], shared: int, routed: int
) -> list[str]:
    """Return what the target cannot express."""
    bias = attention_bias(dense)
    family = FAMILIES[dense["model_type"]]
    window = sliding_window(dense)
    found = {
        f"it has no bias on {bias}": _BIASES.index(bias) > _BIASES.index(target.attention_bias),
        "it has no q/k norm": family.qk_norm and not target.qk_norm,
        "it always norms q and k": not family.qk_norm and target.qk_norm is True,
        f"it has no sliding window ({window} tokens)": window and not target.window,
        "it has no multipliers": family.multipliers and not target.multipliers,
        f"it has no shared expert, {shared} slices are shared": shared and not target.shared_down,
        "it always has a shared expert, no slice is shared": not shared and target.shared_down,
        "it needs two routed experts": routed < 2 and target.score == "sigmoid",
    }
    return [reason for reason, holds in found.items() if holds]


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
    *,
    experts: int,
    active: int,
    dtype: str,
    shared: int = 0,
) -> dict[str, Any]:
    """Return the config.json of a converted model.

    The rotary settings are written in both spellings: transformers 5 reads `rope_parameters`,
    vLLM, llama.cpp and mistral.rs read `rope_theta` and `rope_scaling`, which MLX wants to see even
    where it is null. Where an expert's rows are not a multiple of 16 bytes, which torch's grouped
    matrix product refuses, the config tells transformers to run the experts one by one.

    Args:
        target: the architecture to write.
        dense: the dense model's canonical config.json.
        experts: E, slices that the dense FFN is cut into, the shared ones included.
        active: k, slices that run for a token, the shared ones included.
        shared: slices that always run.
        dtype: of the stored weights ("float32", "bfloat16", "float16").
    """
    rope = rope_parameters(dense)
    size = dense["intermediate_size"] // experts
    config: dict[str, Any] = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        **{key: dense[key] for key in _COPIED if key in dense},
        **target.settings,
        target.expert_size_key: size,
        target.num_experts_key: experts - shared,
        "num_experts_per_tok": active - shared,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if not target.tied:
        config["tie_word_embeddings"] = False
    if target.shared_down:
        config[target.shared_key] = shared if target.shared_in_slices else shared * size
    if target.attention_bias != "none":
        config["attention_bias"] = attention_bias(dense) != "none"
    if isinstance(target.qk_norm, str):
        config[target.qk_norm] = FAMILIES[dense["model_type"]].qk_norm
    if target.window:
        config["sliding_window"] = sliding_window(dense)
    if target.multipliers:
        own = {"attention_multiplier": dense["head_dim"] ** -0.5}
        config |= {key: dense.get(key, own.get(key, one)) for key, one in MULTIPLIERS.items()}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if size % 8 or config["hidden_size"] % 8:
        config["experts_implementation"] = "eager"
    return config


def pruned_config(dense: Mapping[str, Any], *, slices: int, kept: int) -> dict[str, Any]:
    """Return the config.json of a dense model that keeps some of its FFN's slices."""
    return {
        **dense,
        "architectures": [FAMILIES[dense["model_type"]].architecture],
        "intermediate_size": dense["intermediate_size"] // slices * kept,
    }
