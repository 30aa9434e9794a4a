"""Native MoE targets: what a converted model is written as, each a row of `targets.yaml`.

A target is an architecture that transformers, vLLM and llama.cpp already run; no code of moefy
travels with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from moefy.checkpoint.families import (
    FAMILIES,
    MULTIPLIERS,
    TEMPERATURE,
    Bias,
    Window,
    attention_bias,
    has_qk_norm,
    rope_settings,
    rotary_fraction,
    rotary_layers,
    sliding_layers,
    sliding_window,
)
from moefy.checkpoint.meaning import SIZES, own_keys
from moefy.checkpoint.whole import WHOLE, text_type, whole_config, whole_target
from moefy.errors import ArchitectureError
from moefy.split import Split

_COPIED = (
    *SIZES,
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
)
_BIASES: tuple[Bias, ...] = ("none", "qkv", "qkvo")
RouterScore = Literal["softmax", "sigmoid", "shares of sigmoids"]


@dataclass(frozen=True)
class NativeTarget:
    """The checkpoint layout of one MoE architecture, in the form that lies on disk.

    Names of tensors are those behind the layer prefix. An expert's matrices have `{expert}` in
    their names and the dense family's shapes with the expert's size for intermediate_size; without
    `{expert}` the tensors of all experts are one, [num_experts, …]. Where `gate` and `up` have the
    same name, gate lies above up.
    """

    model_type: str
    architecture: str  # `architectures[0]` in config.json
    router: str  # [num_experts, hidden_size]
    gate: str
    up: str
    down: str
    settings: Mapping[str, Any]  # what makes it compute what the conversion relies on
    # the dense family, or text part of a vision-language model, whose layers it has but for the
    # FFN, with the same config keys
    of: str | None = None
    transposed: bool = False  # whether the one tensor of all experts has [columns, rows]
    # the shared expert; None if the architecture has none
    shared_gate: str | None = None
    shared_up: str | None = None
    shared_down: str | None = None
    # config keys; `shared_key` counts slices of an expert's size, or neurons
    num_experts_key: str = "num_local_experts"
    expert_size_key: str = "intermediate_size"
    active_key: str = "num_experts_per_tok"
    shared_key: str | None = "shared_intermediate_size"  # None: always one slice
    shared_in_slices: bool = False
    shared_optional: bool = False  # elsewhere the shared expert must not be empty
    shared_switch: str | None = None  # [1, hidden_size], whose sigmoid weighs the shared expert
    # softmax over the chosen, the sigmoid of each, doubled, or its share of the chosen's sigmoids
    score: RouterScore = "softmax"
    selection_bias: str | None = None  # shifts the choice alone
    selection_bias_shape: Sequence[int] = (-1,)
    attention_bias: Bias = "none"  # the most that it can express, see `families.attention_bias`
    unbiased_in_vllm: bool = False  # with biases it is the choice where no other target is exact
    qk_norm: str | bool | None = None  # config key, or True where q and k are always normed by head
    # Whether every runtime lets the output matrix be the embeddings; if not, it is written as a
    # tensor of its own.
    tied: bool = True
    window: Window = "no"  # "by layer" goes with a rotary embedding by layer
    sinks: str | None = None  # [num_heads], logits in every query's softmax besides the keys' own
    multipliers: bool = False  # Granite's
    partial_rotary: bool = False  # heads that are rotated in part


_ROWS = yaml.safe_load((files("moefy.checkpoint") / "targets.yaml").read_text())
TARGETS = {
    name: NativeTarget(model_type=name, **row)
    for name, row in _ROWS.items()
    if not name.startswith(".")
}
"""In the order of preference."""


def check_known(model_type: Any, folder: Path | str) -> None:
    """Raise an ArchitectureError for a model that moefy neither converts nor writes."""
    if model_type not in [*FAMILIES, *TARGETS]:  # a list: any JSON value may be asked for
        known = ", ".join(sorted({**FAMILIES, **TARGETS}))
        raise ArchitectureError(f"{folder} has the architecture {model_type!r}; known: {known}")


def native_target(
    dense: Mapping[str, Any], split: Split, *, asked: str | None = None
) -> NativeTarget:
    """Return the first of `TARGETS` that computes a split of a dense model, or the one `asked` for.

    Those that vLLM runs without the model's biases come last.

    Raises:
        ArchitectureError: the target, or every target, computes something else.
    """
    wants = {name: _differences(target, dense, split) for name, target in TARGETS.items()}
    biased = attention_bias(dense) != "none"
    order = sorted(TARGETS, key=lambda name: biased and TARGETS[name].unbiased_in_vllm)
    for name in (asked,) if asked else order:
        if not wants[name]:
            return TARGETS[name]
    if asked:
        fitting = [name for name, missing in wants.items() if not missing]
        raise ArchitectureError(
            f"{asked} cannot hold this split of a {dense['model_type']} model: "
            f"{', '.join(wants[asked])}"
            + (f"; pass --target {' or '.join(fitting)}" if fitting else "")
        )
    family = dense["model_type"]
    own = (family,) if FAMILIES[family].own else (None, family)
    listed = "; ".join(f"{n}: {missing[0]}" for n, missing in wants.items() if TARGETS[n].of in own)
    raise ArchitectureError(
        f"no native target computes this split of a {dense['model_type']} model ({listed}); "
        "--target NAME says all that one of them lacks"
    )


def expressible(
    dense: Mapping[str, Any], split: Split, *, asked: str | None = None
) -> tuple[Split, NativeTarget]:
    """Return a split and its `native_target`, with no or one shared slice if no other has one.

    Raises:
        ArchitectureError: see `native_target`.
    """
    for shared in (0, 1):
        try:
            return split, native_target(dense, split, asked=asked)
        except ArchitectureError:
            other = Split(split.experts, split.active, shared)
            if other.chosen and any(not _differences(t, dense, other) for t in TARGETS.values()):
                split = other
    return split, native_target(dense, split, asked=asked)


def _differences(target: NativeTarget, dense: Mapping[str, Any], split: Split) -> list[str]:
    """Return what the target cannot express."""
    family = FAMILIES[dense["model_type"]]
    found = {
        f"it is for {target.of} models": (
            target.of not in (None, family.model_type, text_type(dense))
        ),
        "it is no vision-language model": WHOLE in dense
        and target.model_type != whole_target(dense),
        f"it has not the {family.own} of {family.model_type}": (
            family.own and target.of != family.model_type
        ),
        **({} if target.of else _differences_in_attention(target, dense)),
        f"it has no shared expert, {split.shared} slices are shared": split.shared
        and not target.shared_down,
        "it always has a shared expert, no slice is shared": (
            not split.shared and target.shared_down and not target.shared_optional
        ),
        f"it always has one shared slice, not {split.shared}": (
            target.shared_key is None and split.shared != 1
        ),
        "it needs two routed experts": split.routed < 2 and target.score == "sigmoid",
    }
    return [reason for reason, holds in found.items() if holds]


def _differences_in_attention(target: NativeTarget, dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a target for many families may lack, and whether it does."""
    bias, family = attention_bias(dense), FAMILIES[dense["model_type"]]
    qk_norm = has_qk_norm(dense)
    window = sliding_window(dense)
    fraction = rotary_fraction(dense)
    rotary = all(rotary_layers(dense))
    return {
        f"it has no bias on {bias}": _BIASES.index(bias) > _BIASES.index(target.attention_bias),
        "it has no q/k norm": qk_norm and not target.qk_norm,
        "it always norms q and k": not qk_norm and target.qk_norm is True,
        f"it has no sliding window ({window} tokens)": window and target.window == "no",
        "its window is in all layers": (
            window and target.window == "in all layers" and not all(sliding_layers(dense))
        ),
        "it rotates in all layers": not rotary and target.window != "by layer",
        "it is for models whose layers differ or have a window": (
            rotary and not window and target.window == "by layer"
        ),
        "it has no multipliers": family.multipliers and not target.multipliers,
        f"it rotates whole heads, not {fraction:g} of each": (
            fraction != 1 and not target.partial_rotary
        ),
    }


def is_unbiased_in_vllm(config: Mapping[str, Any]) -> bool:
    """Say whether vLLM 0.32 leaves out the attention's biases of a model, by its config.json."""
    target = TARGETS.get(config["model_type"])
    return bool(target and target.unbiased_in_vllm and config.get("attention_bias"))


def target_config(
    target: NativeTarget, dense: Mapping[str, Any], split: Split, *, dtype: str
) -> dict[str, Any]:
    """Return the config.json of a converted model; `dense` is canonical, `dtype` a stored one."""
    size = split.size(dense["intermediate_size"])
    keys = (*_COPIED, *(own_keys({"model_type": target.model_type}) if target.of else ()))
    config: dict[str, Any] = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        **{key: dense[key] for key in keys if key in dense},
        **target.settings,
        target.expert_size_key: size,
        target.num_experts_key: split.routed,
        target.active_key: split.chosen,
        **_rope_settings(dense),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if not target.tied:
        config["tie_word_embeddings"] = False
    if target.shared_key and target.shared_down:
        config[target.shared_key] = split.shared * (1 if target.shared_in_slices else size)
    if target.attention_bias != "none":
        config["attention_bias"] = attention_bias(dense) != "none"
    if isinstance(target.qk_norm, str):
        config[target.qk_norm] = has_qk_norm(dense)
    if target.window != "no":
        config["sliding_window"] = sliding_window(dense)
    if target.window == "by layer":
        # llama.cpp wants a sliding layer: without a window, that of all layers is the whole context
        window = sliding_window(dense)
        slides = sliding_layers(dense) if window else (True,) * dense["num_hidden_layers"]
        rotates = rotary_layers(dense)
        config |= {
            "sliding_window": window or dense["max_position_embeddings"],
            "layer_types": [("full_attention", "sliding_attention")[slide] for slide in slides],
            "layer_rope_theta": [dense["rope_theta"] if rotate else 0 for rotate in rotates],
            "no_rope_layers": [int(rotate) for rotate in rotates],  # llama.cpp's key for the same
        }
    if target.partial_rotary:
        config["partial_rotary_factor"] = rotary_fraction(dense)
    if target.multipliers:
        own = {"attention_multiplier": dense["head_dim"] ** -0.5}
        config |= {key: dense.get(key, own.get(key, one)) for key, one in MULTIPLIERS.items()}
    # torch's grouped matrix product refuses rows that are no multiple of 16 bytes: here
    # transformers runs the experts one by one
    if size % 8 or config["hidden_size"] % 8:
        config["experts_implementation"] = "eager"
    return whole_config(dense, config) if WHOLE in dense else config


def _rope_settings(dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config keys of the rotary embedding, and of the context that it is exact for."""
    if FAMILIES[dense["model_type"]].tempered:
        rope, longest = dict(dense["rope_parameters"]), dense["max_position_embeddings"]
        # behind the original context attention gets a temperature, which no target has
        if rope.pop(TEMPERATURE):
            longest = min(longest, rope["original_max_position_embeddings"])
        rope.pop("max_position_embeddings", None)
        return {"max_position_embeddings": longest, **rope_settings({"rope_parameters": rope})}
    return {key: dense[key] for key in ("rope_parameters", "rope_theta", "rope_scaling")}


def pruned_config(dense: Mapping[str, Any], split: Split) -> dict[str, Any]:
    """Return the config.json of a dense model that keeps the shared slices of its FFNs."""
    return {
        **dense,
        "architectures": [FAMILIES[dense["model_type"]].architecture],
        "intermediate_size": split.size(dense["intermediate_size"]) * split.shared,
    }
