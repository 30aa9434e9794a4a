"""Parameters and FLOPs, counted from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefy.checkpoint.families import FAMILIES, attention_bias, canonical_config
from moefy.checkpoint.targets import TARGETS
from moefy.errors import ArchitectureError


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        experts: routed experts per layer (a shared one is not counted), 0 for a dense model.
        active_experts: routed experts that run for one token, 0 for a dense model.
        total_params: all parameters; tied embeddings count once.
        active_params: parameters that one token uses: all but the experts it is not routed to
            (the count of the LLaMA-MoE paper, embeddings included).
        flops_per_token: forward floating-point operations for one token, averaged over the
            positions of a sequence of `context` tokens.
        context: that sequence length, in tokens.
    """

    experts: int
    active_experts: int
    total_params: int
    active_params: int
    flops_per_token: int
    context: int


def cost(config: Mapping[str, Any], *, context: int = 512) -> Cost:
    """Count a dense or converted model.

    FLOPs are those of the matrix products, two per weight that a token meets (embedding look-up,
    norms and activation functions are left out), plus attention's scores and values,
    4·n_layers·n_heads·head_dim·(context + 1)/2: the causal mean over positions.

    Args:
        config: config.json of a LLaMA or of a native target.
        context: sequence length for attention's share.

    Raises:
        ArchitectureError: the architecture has no table here.
    """
    model_type = config.get("model_type")
    experts = active = shared_size = sinks = 0
    if model_type in TARGETS:
        target = TARGETS[model_type]
        experts, active = int(config[target.num_experts_key]), int(config["num_experts_per_tok"])
        size = config[target.expert_size_key]
        if target.shared_down:
            shared_size = config[target.shared_key] * (size if target.shared_in_slices else 1)
        sinks = config["num_attention_heads"] if target.sinks else 0
        bias = target.attention_bias if config.get("attention_bias") else "none"
        key = target.qk_norm
        qk_norm = bool(config.get(key) if isinstance(key, str) else key)
    elif model_type in FAMILIES:
        config = canonical_config(FAMILIES[model_type], config)
        size = config["intermediate_size"]
        bias, qk_norm = attention_bias(config), FAMILIES[config["model_type"]].qk_norm
    else:
        known = ", ".join(sorted([*FAMILIES, *TARGETS]))
        raise ArchitectureError(f"cannot count the architecture {model_type!r}; known: {known}")

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    tied = bool(config.get("tie_word_embeddings", False))

    attention = 2 * hidden * head_dim * (heads + kv_heads)
    ffn = 3 * hidden * size  # of one expert, or of the dense layer
    shared = 3 * hidden * shared_size
    router = hidden * experts
    vectors = 2 * hidden + 2 * head_dim * qk_norm + sinks  # norms, sinks and biases
    vectors += head_dim * (heads + 2 * kv_heads) * (bias != "none") + hidden * (bias == "qkvo")
    outside = vocab * hidden * (1 if tied else 2) + hidden

    def params(num_ffns: int) -> int:
        return outside + layers * (attention + shared + num_ffns * ffn + router + vectors)

    met = vocab * hidden + layers * (attention + shared + max(active, 1) * ffn + router)
    attended = 2 * layers * heads * head_dim * (context + 1)
    return Cost(
        experts=experts,
        active_experts=active,
        total_params=params(max(experts, 1)),
        active_params=params(max(active, 1)),
        flops_per_token=2 * met + attended,
        context=context,
    )
