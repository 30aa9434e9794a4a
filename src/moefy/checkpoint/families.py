"""Dense families: what a source's tensors are called and what its config means, as data.

A family is a row of `families.yaml`. A tensor that no rule maps stops the conversion, so nothing is
dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import yaml

from moefy.checkpoint.meaning import check_around, meaning_of, own_keys
from moefy.checkpoint.skeleton import Shapes, skeleton_of
from moefy.errors import ArchitectureError, reason

Bias = Literal["none", "qkv", "qkvo"]
Window = Literal["no", "in all layers", "by layer"]

TEMPERATURE = "llama_4_scaling_beta"
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Rotary embeddings that the targets share with the dense families."""


@dataclass(frozen=True)
class DenseFamily:
    """The checkpoint layout of one dense architecture.

    Every layer adds attention, or what stands in its place, and a SwiGLU FFN to the residual
    stream, each with a norm in front of it or behind. transformers says which tensors a layer has.
    """

    model_type: str
    name: str = ""  # `architectures[0]` begins with it, or with the capitalised `model_type`
    # what no other architecture computes but the target that is `of` this family
    own: str = ""
    window: Window = "no"  # layers that have the sliding window, if the config has one
    needs: Sequence[str] = ()  # config keys without which transformers runs no model of it
    mixers: Sequence[str] = ()  # `layer_types` without attention
    parallel: bool = False  # whether attention and FFN read the same normed stream
    multipliers: bool = False  # whether embeddings, attention, residuals and logits are scaled
    rope_switches: str | None = None  # config key that says which layers have the rotary embedding
    partial_rotary: bool = False  # whether a part of each head may go without rotary embedding
    tempered: bool = False  # whether attention has a temperature behind the original context
    norm_offset: float = 0.0  # what is added to a norm's stored weight
    # tensors that are stored as one, their rows from the top down
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    gate: str = "mlp.gate_proj.weight"
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"
    ffn_norm: str | None = (
        "post_attention_layernorm.weight"  # None: the FFN reads the stream itself
    )
    after_ffn: str | None = None  # norm of what the FFN adds to the stream
    final_norm: str = "model.norm.weight"
    # settings with which `intermediate_size` is the FFN's size, where transformers changes it
    sized: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """`architectures[0]` in config.json."""
        return f"{self.name or self.model_type.capitalize()}ForCausalLM"

    @property
    def model_tensors(self) -> tuple[str, str, str]:
        """Names of the tensors outside of the layers."""
        return "model.embed_tokens.weight", self.final_norm, "lm_head.weight"

    layer = "model.layers.{layer}."


QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
O_PROJ = "self_attn.o_proj"

_DATA = yaml.safe_load((files("moefy.checkpoint") / "families.yaml").read_text())
FAMILIES = {name: DenseFamily(name, **row) for name, row in _DATA["families"].items()}
NOT_CARRIED: dict[str, str] = _DATA["not_carried"]
"""Well-known dense architectures that are refused, with the reason."""

WRAPPED: dict[str, str] = _DATA["wrapped"]
"""Families by the `model_type` of text models that compute the same inside of others."""

WHOLES: dict[str, dict[str, str]] = _DATA["wholes"]
"""Vision-language models that are converted whole, by `model_type`."""

_INHERITED = ("dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id")

MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)
"""Granite's scales and their defaults; attention's is 1/√head_dim in the other families."""


def dense_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a dense config.json as transformers reads it; `source` names it in messages.

    Raises:
        CheckpointError: see `meaning_of`.
        ArchitectureError: it is unknown, or has a setting that would be changed.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        model_type = config.get("model_type")
        why = NOT_CARRIED.get(str(model_type))
        raise ArchitectureError(
            f"{source} has the architecture {reason(repr(model_type))}"
            + (f" ({why})" if why else "")
            + f"; moefy converts dense {', '.join(FAMILIES)} models (also SmolLM2, TinyLlama, "
            "Qwen2.5, Phi-3 and their kin, by these names)"
        )
    read = meaning_of(config, source)
    heads = read["num_attention_heads"]
    rope, part = read["rope_parameters"], rotary_fraction(read)
    layers, longest = read["num_hidden_layers"], read["max_position_embeddings"]
    window = read.get("sliding_window")
    slides = window is not None and family.window == "in all layers"
    usual = ("full_attention", "sliding_attention")[slides]
    types = set(read.get("layer_types") or ()) - {usual, *family.mixers}
    if family.window == "by layer" and window is not None:
        types -= {"sliding_attention"}
    switches = read.get(family.rope_switches or "", ())
    refused = {
        f"has the rotary embedding {rope['rope_type']!r}; known are {', '.join(ROPE_TYPES)} "
        "(rope_parameters or rope_scaling)": rope["rope_type"] not in ROPE_TYPES,
        f"rotates only a part of each head (partial_rotary_factor {part} in rope_parameters or "
        f"rope_scaling), which no known {family.model_type} model does": (
            part != 1 and not family.partial_rotary
        ),
        f"has layer_types of {', '.join(sorted(types))}, which {family.model_type} does not "
        f"compute with sliding_window = {window} and use_sliding_window = "
        f"{read.get('use_sliding_window')}": types,
        f"has sliding_window = {window}, which transformers follows in the cache of a "
        f"{family.model_type} model and not in its attention": (
            family.window == "no"
            and window is not None
            and not (isinstance(window, int) and window >= longest)
        ),
        f"has no {TEMPERATURE} or original_max_position_embeddings in rope_parameters (or "
        "rope_scaling)": (
            family.tempered and not {TEMPERATURE, "original_max_position_embeddings"} <= {*rope}
        ),
        **{
            f"has {key} = null, with which transformers runs no {family.model_type} model": True
            for key in family.needs
            if read.get(key) is None
        },
        "has residual_multiplier = 0, by which the experts' weights are divided": (
            read.get("residual_multiplier") == 0
        ),
        f"has num_attention_heads = {heads}, more than hidden_size": heads > read["hidden_size"],
        f"has {heads} num_attention_heads, no multiple of its num_key_value_heads": (
            heads % read["num_key_value_heads"]
        ),
        f"has {family.rope_switches} for {len(switches)} layers and num_hidden_layers = {layers}": (
            family.rope_switches and len(switches) != layers
        ),
    }
    for key, only in {"hidden_act": "silu", "mlp_bias": False, "use_bias": False}.items():
        found = read.get(key, only)
        what = f"sets {key} = {found!r}; the native targets can only express {only!r}"
        refused[what] = found != only and key in own_keys(read)
    for what, holds in refused.items():
        if holds:
            raise ArchitectureError(f"{source} {reason(what)}")
    read["head_dim"] = read.get("head_dim") or read["hidden_size"] // heads
    read |= rope_settings(read)
    if family.sized:
        read["intermediate_size"] = skeleton_of(read).shapes(0)[family.gate][0]
        read |= family.sized
    # null means no dropout or cache for some families, and nothing for the others
    read["use_cache"] = bool(read.get("use_cache", True))
    return {**read, "attention_dropout": read.get("attention_dropout") or 0.0}


def text_part(config: Mapping[str, Any], part: str | None, source: str) -> dict[str, Any]:
    """Return the config.json of a vision-language model's text model; another one as it is.

    Raises:
        ArchitectureError: `part` does not say so and there is no whole, or there is no such part.
    """
    text, kind = config.get("text_config"), reason(repr(config.get("model_type")), 60)
    if config.get("model_type") in [*FAMILIES] or not isinstance(text, dict):
        if part:
            raise ArchitectureError(f"{source} ({kind}) has no text_config: leave --part out")
        return dict(config)
    if not part and config.get("model_type") not in WHOLES:
        raise ArchitectureError(
            f"{source} ({kind}) has its text model, {reason(text.get('model_type'), 60)}, among "
            "others: pass --part text to convert that alone"
        )
    check_around(config, source)
    text = {key: config[key] for key in _INHERITED if key in config} | text
    family = WRAPPED.get(str(text.get("model_type")))
    if family or text.get("model_type") in [*FAMILIES]:
        read = meaning_of(text, source)  # what the next lines leave out must be sound, too
        text = read | {"model_type": family} if family else text
    if "tie_word_embeddings" in config:  # the whole model's loader ties by its own key
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    if family:
        # where images and texts stand; all the same in a text
        for key in ("mrope_section", "mrope_interleaved"):
            text["rope_parameters"].pop(key, None)
    return text


def attention_bias(config: Mapping[str, Any]) -> Bias:
    """Return which attention projections of a dense model have a bias."""
    shapes = skeleton_of(config).shapes(0)
    if f"{O_PROJ}.bias" in shapes:
        return "qkvo"
    return "qkv" if f"{QKV[0]}.bias" in shapes else "none"


def has_qk_norm(config: Mapping[str, Any]) -> bool:
    """Return whether queries and keys of a dense or converted model are normed by head."""
    return "self_attn.q_norm.weight" in skeleton_of(config).shapes(0)


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that attention looks back on, or None where that is all of them."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if not any(sliding_layers(config)) or window is None or (longest and window >= longest):
        return None
    return int(window)


def sliding_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for every layer whether it has the sliding window, if there is one."""
    window = FAMILIES[config["model_type"]].window
    if window == "by layer":
        return tuple(kind == "sliding_attention" for kind in config["layer_types"])
    return (window == "in all layers",) * config["num_hidden_layers"]


def rotary_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for every layer whether it has the rotary embedding."""
    key = FAMILIES[config["model_type"]].rope_switches
    return tuple(map(bool, config[key])) if key else (True,) * config["num_hidden_layers"]


def layer_shapes(config: Mapping[str, Any], layer_idx: int) -> Shapes:
    """Return the shape of every tensor of a layer, the FFN's included, fused ones in parts."""
    family, found = FAMILIES[config["model_type"]], dict(skeleton_of(config).shapes(layer_idx))
    rows = dict.fromkeys((family.gate, family.up), config["intermediate_size"])
    for name in QKV:
        key = "num_attention_heads" if name == QKV[0] else "num_key_value_heads"
        rows[f"{name}.weight"] = config[key] * config["head_dim"]
    for whole, parts in family.fused.items():
        columns = found.pop(whole)[1]
        found |= {part: (rows[part], columns) for part in parts}
    return found


def rotary_fraction(config: Mapping[str, Any]) -> float:
    """Return the part of each head, from its start, that has the rotary embedding."""
    return float(config["rope_parameters"].get("partial_rotary_factor") or 1.0)


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config keys of the rotary embedding in every spelling that a runtime reads."""
    # transformers 5 reads the first one; vLLM, llama.cpp and mistral.rs read the others, and MLX
    # wants to see `rope_scaling` even where it is null
    rope = {k: v for k, v in config["rope_parameters"].items() if k != "type"}
    if rotary_fraction(config) == 1:
        rope.pop("partial_rotary_factor", None)
    plain = rope["rope_type"] == "default"
    scaling = None if plain else {k: v for k, v in rope.items() if k != "rope_theta"}
    return {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
