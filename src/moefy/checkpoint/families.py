"""Dense families: what a source's tensors are called and what its config means, as data.

A family is a table. A tensor that no rule maps stops the conversion, so nothing is dropped in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moefy.errors import ArchitectureError

Bias = Literal["none", "qkv", "qkvo"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Rotary embeddings that the targets share with the dense families."""


@dataclass(frozen=True)
class DenseFamily:
    """The checkpoint layout of one dense architecture; all have LLaMA's block."""

    model_type: str
    name: str = ""  # `architectures[0]` begins with it, or with the capitalised `model_type`
    attention_bias: str = "none"  # a `Bias`, or the config key that switches all four on
    qk_norm: bool = False  # whether queries and keys are normed by head
    window_key: str | None = None  # config key of the sliding window, if the family has one
    # config key that switches the window on; the first `max_window_layers` layers go without it
    window_switch: str | None = None
    multipliers: bool = False  # whether embeddings, attention, residuals and logits are scaled
    rope_switches: str | None = None  # config key that says which layers have the rotary embedding
    partial_rotary: bool = False  # whether a part of each head may go without rotary embedding
    extra: tuple[str, ...] = ()  # config keys that transformers needs of this family alone
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of missing keys, over `DEFAULTS`
    # tensors that are stored as one, their rows from the top down
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """`architectures[0]` in config.json."""
        return f"{self.name or self.model_type.capitalize()}ForCausalLM"

    layer = "model.layers.{layer}."
    gate = "mlp.gate_proj.weight"
    up = "mlp.up_proj.weight"
    down = "mlp.down_proj.weight"
    ffn_norm = "post_attention_layernorm.weight"
    model_tensors = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    optional = ("self_attn.rotary_emb.inv_freq",)


QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
O_BIAS = "self_attn.o_proj.bias"

LLAMA = DenseFamily("llama", attention_bias="attention_bias")
MISTRAL = DenseFamily(
    "mistral",
    window_key="sliding_window",
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
)
QWEN2 = DenseFamily(
    "qwen2",
    attention_bias="qkv",
    window_key="sliding_window",
    window_switch="use_sliding_window",
    defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32},
)
QWEN3 = DenseFamily(
    "qwen3",
    attention_bias="attention_bias",
    qk_norm=True,
    window_key="sliding_window",
    window_switch="use_sliding_window",
    defaults={**QWEN2.defaults, "head_dim": 128},
)
SMOLLM3 = DenseFamily(
    "smollm3",
    name="SmolLM3",
    attention_bias="attention_bias",
    window_key="sliding_window",
    window_switch="use_sliding_window",
    rope_switches="no_rope_layers",  # 1 where there is one
    extra=("no_rope_layers", "layer_types", "pad_token_id"),
    defaults={
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
)
GRANITE = DenseFamily("granite", attention_bias="attention_bias", multipliers=True)
PHI3 = DenseFamily(
    "phi3",
    window_key="sliding_window",
    partial_rotary=True,
    extra=("original_max_position_embeddings", "pad_token_id"),
    defaults={
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
    },
    fused={
        "self_attn.qkv_proj.weight": tuple(f"{name}.weight" for name in QKV),
        "mlp.gate_up_proj.weight": (DenseFamily.gate, DenseFamily.up),
    },
)

FAMILIES = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GRANITE, PHI3)}

NOT_CARRIED = {
    "olmo2": "norms behind attention and FFN, which only FlexOlmo has among the MoE targets; that "
    "has no shared experts, and llama.cpp does not run it",
    "olmo3": "norms behind attention and FFN together with sliding windows",
    "gemma": "GELU experts, for which llama.cpp and vLLM would compute SiLU in every target",
    "gemma2": "four norms per layer and soft-capped logits",
    "gemma3_text": "four norms per layer",
    "phi": "LayerNorm and a two-matrix FFN",
    "gpt2": "LayerNorm and a two-matrix FFN",
}
"""Well-known dense architectures that are refused, with the reason."""

MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)
"""Granite's scales and their defaults; attention's is 1/√head_dim in the other families."""

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "vocab_size",
)
"""Config keys of a model's shape."""

DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
}
"""What transformers assumes where config.json says nothing, in every family."""


def dense_family(config: Mapping[str, Any], source: str) -> DenseFamily:
    """Return the family of a dense config.json; `source` names it in messages.

    Raises:
        ArchitectureError: it is unknown, quantised, or has a setting that would be changed.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        reason = NOT_CARRIED.get(str(model_type))
        raise ArchitectureError(
            f"{source} has the architecture {model_type!r}"
            + (f" ({reason})" if reason else "")
            + f"; moefy converts dense {', '.join(FAMILIES)} models (also SmolLM2, TinyLlama, "
            "Qwen2.5, Phi-3 and their kin, by these names)"
        )
    family, quantised = FAMILIES[model_type], config.get("quantization_config") or {}
    rope, part = rope_parameters(config)["rope_type"], rotary_fraction(config)
    refused = {
        f"is quantised ({quantised.get('quant_method', 'unknown')}): convert the unquantised "
        "checkpoint, then quantise": quantised,
        f"has the rotary embedding {rope!r}; known are {', '.join(ROPE_TYPES)}": (
            rope not in ROPE_TYPES
        ),
        f"rotates only a part of each head (partial_rotary_factor {part}), which no known "
        f"{model_type} model does": part != 1 and not family.partial_rotary,
    }
    for key, only in {"hidden_act": "silu", "mlp_bias": False}.items():
        found = config.get(key, only)
        what = f"sets {key} = {found!r}; the native targets can only express {only!r}"
        refused[what] = found != only
    for what, holds in refused.items():
        if holds:
            raise ArchitectureError(f"{source} {what}")
    return family


def canonical_config(family: DenseFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dense config.json with the family's defaults filled in, code references left out."""
    heads = config.get("num_attention_heads") or 1
    filled: dict[str, Any] = {
        "num_key_value_heads": heads,
        "head_dim": config.get("hidden_size", heads) // heads,
        **DEFAULTS,
        **(MULTIPLIERS if family.multipliers else {}),
        **family.defaults,
    }
    filled |= {key: value for key, value in config.items() if value is not None}
    for key in filter(None, (family.window_key, *family.extra)):
        # null means none for these, where a missing key means the default
        if key in config:
            filled[key] = config[key]
    filled.pop("auto_map", None)
    return filled


def attention_bias(config: Mapping[str, Any]) -> Bias:
    """Return which attention projections of a dense model have a bias."""
    match FAMILIES[config["model_type"]].attention_bias:
        case "none" | "qkv" | "qkvo" as fixed:
            return fixed
        case key:
            return "qkvo" if config.get(key) else "none"


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that attention looks back on, or None where that is all of them."""
    family = FAMILIES[config["model_type"]]
    switch = family.window_switch
    if not family.window_key or (switch and not (config[switch] and any(sliding_layers(config)))):
        return None
    window = config.get(family.window_key)
    longest = config.get("max_position_embeddings")
    return None if window is None or (longest and window >= longest) else int(window)


def sliding_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for every layer whether it has the sliding window, if there is one."""
    layers, family = config["num_hidden_layers"], FAMILIES[config["model_type"]]
    if not family.window_switch:
        return (True,) * layers
    if types := config.get("layer_types"):
        return tuple(kind == "sliding_attention" for kind in types)
    if family.rope_switches:  # where there is no rotary embedding
        return tuple(not has for has in rotary_layers(config))
    return tuple(layer_idx >= config["max_window_layers"] for layer_idx in range(layers))


def rotary_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for every layer whether it has the rotary embedding."""
    layers, key = config["num_hidden_layers"], FAMILIES[config["model_type"]].rope_switches
    if key is None:
        return (True,) * layers
    if switches := config.get(key):
        return tuple(map(bool, switches))
    every = config["no_rope_layer_interval"]
    return tuple((layer_idx + 1) % every != 0 for layer_idx in range(layers))


def layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a layer but for the three FFN matrices."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = (
        config["num_attention_heads"] * head_dim,
        config["num_key_value_heads"] * head_dim,
    )
    rows = dict(zip(QKV, (queries, keys, keys), strict=True))
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        DenseFamily.ffn_norm: (hidden,),
        **{f"{name}.weight": (size, hidden) for name, size in rows.items()},
        "self_attn.o_proj.weight": (hidden, queries),
    }
    bias = attention_bias(config)
    if bias != "none":
        shapes |= {f"{name}.bias": (size,) for name, size in rows.items()}
    if bias == "qkvo":
        shapes[O_BIAS] = (hidden,)
    if FAMILIES[config["model_type"]].qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    return shapes


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a config in transformers 5's form."""
    # older files spell them as `rope_theta` beside `rope_scaling`, newer ones as `rope_parameters`
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    if config.get("model_type") == "phi3" and parameters["rope_type"] in ("su", "yarn"):
        parameters["rope_type"] = "longrope"  # Phi-3's earlier names for it
    parameters.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    original = config.get("original_max_position_embeddings")  # wins over the one in the dict
    if original and parameters["rope_type"] != "default":
        parameters["original_max_position_embeddings"] = original
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if parameters["partial_rotary_factor"] in (None, 1):
        del parameters["partial_rotary_factor"]
    return parameters


def rotary_fraction(config: Mapping[str, Any]) -> float:
    """Return the part of each head, from its start, that has the rotary embedding."""
    return float(rope_parameters(config).get("partial_rotary_factor", 1.0))


def transformers_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers' `AutoConfig.for_model` needs of a canonical config."""
    family = FAMILIES[config["model_type"]]
    names = (
        "model_type",
        *SIZES,
        *DEFAULTS,
        *(MULTIPLIERS if family.multipliers else ()),
        *filter(None, (family.window_key, family.window_switch)),
        *family.extra,
    )
    settings = {name: config[name] for name in names if name in config}
    return settings | {"rope_parameters": rope_parameters(config)}
