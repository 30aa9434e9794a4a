"""What a config.json means: what transformers reads in it, checked before a model is built from it.

transformers fills in what a file leaves out, knows older spellings, and checks types. Reading a
file in another way than the loader of the model does would convert another model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from moefy.errors import CheckpointError, reason

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
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

_KEPT = (
    *("architectures", "dtype", "model_type", "_name_or_path", "quantization_config"),
    # read where they are, although not every class declares them
    *("head_dim", "layer_types", "original_max_position_embeddings", "sliding_window"),
)
# lists, modules and frequencies of this length are made before a weight is looked at
_MOST = {"num_hidden_layers": 4096, "hidden_size": 1 << 20, "head_dim": 1 << 16}
_ROTARY = (
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)

# attributes of transformers' config classes that a config.json may have as keys
_SHARED = {"model_type", "rope_scaling", "torch_dtype", "name_or_path", "output_attentions"}
_ATTENTION = (None, "eager", "sdpa")
_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")
_DTYPES = (None, "float32", "bfloat16", "float16")
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "attn_implementation": _ATTENTION,  # another name is a kernel that is fetched from the hub
    "_attn_implementation": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "output_hidden_states": (None, False, True),
    "use_return_dict": (True, None),
    "configuration_files": (),  # the newest of them is read instead of config.json
    "num_labels": (None, *range(10_000)),  # a name is made for each
    **dict.fromkeys(
        (
            "transformers_weights",  # another file than the one that is converted
            # another config for the model, or for some of its layers
            *("text_config", "text_encoder", "decoder", "generator", "per_layer_config"),
            *("kv_sharing_modes", "attention_chunk_size", "fusion_config", "distributed_config"),
        ),
        (None,),
    ),
}
"""Values of keys that transformers reads of every model: others compute something else."""


def meaning_of(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the config of a model that transformers knows, as transformers reads it.

    It has the keys of this architecture, and of the others those that mean something: a key that
    another architecture has must not change this one.

    Args:
        config: with a `model_type` that moefy knows.
        source: names it in messages.

    Raises:
        CheckpointError: transformers refuses it, or would take it to mean more than a config.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[config["model_type"]]
    _refuse(config, source, _problems(config, kind))
    try:
        made = _read(kind, config)
    except Exception as error:
        raise CheckpointError(
            f"{source} is refused by transformers, {_blamed(kind, config, error)}: {reason(error)}"
        ) from error
    vocab, padding = made["vocab_size"], made.get("pad_token_id")
    if padding is not None and not -vocab <= padding < vocab:
        raise CheckpointError(f"{source} has pad_token_id = {padding}, vocab_size = {vocab}")
    active = made.get("num_experts_per_tok")
    experts = next((made[key] for key in _NUM_EXPERTS if made.get(key) is not None), None)
    if active is not None and experts is not None and not 1 <= active <= experts:
        raise CheckpointError(f"{source} has num_experts_per_tok = {active} of {experts} experts")
    kept = {*own_keys(config), *_KEPT}
    found = {key: value for key, value in made.items() if key in kept}
    # a key may have two names, and transformers writes the one that it does not read
    for one, other in kind.attribute_map.items():
        for name in {one, other} & made.keys():
            found[one] = found[other] = made[name]
    return found


def check_around(config: Mapping[str, Any], source: str) -> None:
    """Check the keys around a text model, of which transformers gives some to it, too.

    Raises:
        CheckpointError: one of `_ALLOWED` has another value.
    """
    found = ((key, _left_out(key, config[key])) for key in sorted(config) if key != "text_config")
    _refuse(config, source, ((key, problem) for key, problem in found if problem))


def own_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the config keys that the class of this `model_type` declares."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = CONFIG_MAPPING[config["model_type"]]
    every_model = {field.name for field in fields(PreTrainedConfig)}
    return frozenset({field.name for field in fields(kind)} - every_model)


def _read(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    # a copy, because transformers completes the rotary settings where they stand
    given = copy.deepcopy(dict(config))
    for rope in (given.get("rope_scaling"), given.get("rope_parameters")):
        if isinstance(rope, dict) and rope.get("type") == "su":  # Phi-3's first name for it
            rope["type"] = "longrope"
    found: dict[str, Any] = kind.from_dict(given).to_dict()
    rope = found["rope_parameters"]
    part = rope.get("partial_rotary_factor")
    if not (isinstance(rope["rope_type"], str) and rope["rope_theta"] > 0):
        raise ValueError("rope_type must be a name, rope_theta a positive number")
    if part is not None and not 0 < part <= 1:
        raise ValueError("partial_rotary_factor must be in (0, 1]")
    return found


def _refuse(config: Mapping[str, Any], source: str, problems: Iterable[tuple[str, str]]) -> None:
    """Raise the first of the problems, each a key and what is wrong with its value."""
    for key, problem in problems:
        raise CheckpointError(f"{source} has {key} = {reason(repr(config[key]), 60)}: {problem}")


def _left_out(key: str, value: Any) -> str:
    """Say what is wrong with a value that is not among the key's `_ALLOWED` ones, or nothing."""
    refused = key in _ALLOWED and value not in _ALLOWED[key]
    return "moefy reads models that leave this key out" if refused else ""


def _problems(config: Mapping[str, Any], kind: Any) -> Iterator[tuple[str, str]]:
    """Yield keys whose values must not reach transformers, and why."""
    declared = {field.name for field in fields(kind)} | {*kind.attribute_map}
    for key, value in config.items():
        if key in _ALLOWED:
            if problem := _left_out(key, value):
                yield key, problem
        elif hasattr(kind, key) and key not in declared | _SHARED:
            yield key, "it would replace a part of transformers' config class"
        elif key in {*declared, *_ROTARY} and not all(map(_is_sound, _numbers(value))):
            yield key, "no model has such a number"
        elif key in (*SIZES, "sliding_window") and (
            isinstance(value, float) or (isinstance(value, int) and value < 1)
        ):
            yield key, "a positive integer is needed"
        elif key.endswith(("dropout", "_pdrop")) and any(not 0 <= p <= 1 for p in _numbers(value)):
            yield key, "a probability is needed"
    for key, most in _MOST.items():
        if isinstance(config.get(key), int) and config[key] > most:
            yield key, f"at most {most} are read"


def _numbers(value: Any) -> Iterator[float]:
    """Iterate over the numbers in a JSON value, however deep."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case bool():
                pass
            case int() | float() as number:
                yield number
            case list() as items:
                waiting += items
            case dict() as entries:
                waiting += entries.values()


def _is_sound(number: float) -> bool:
    return abs(number) < 1 << 53 if isinstance(number, int) else math.isfinite(number)


def _blamed(kind: Any, config: Mapping[str, Any], error: Exception) -> str:
    """Name the keys that transformers speaks of, or the one without which it reads a config."""
    words = {key: key.replace("num_", "number of ").replace("_", " ") for key in SIZES}
    if named := [key for key in SIZES if words[key] in str(error)]:  # one may be a default
        return f"because of {' and '.join(named)}"
    for key in sorted(config, key=lambda key: "rope" not in key):
        if key == "model_type":
            continue
        try:
            _read(kind, {name: value for name, value in config.items() if name != key})
        except Exception:
            continue
        return f"because of {key} = {reason(repr(config[key]), 60)}"
    return "for more than one key"
