"""Mistral's own layout: params.json beside consolidated.safetensors, under transformers' names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy.checkpoint.reader import read_json
from moefy.checkpoint.tensor_file import TensorFile, rotated_by_halves
from moefy.errors import ArchitectureError, CheckpointError, reason

PARAMS = "params.json"
CONSOLIDATED = "consolidated.safetensors"
_SETTINGS = {
    "dim": "hidden_size",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
}
_LONGEST = ("max_position_embeddings", "max_seq_len", "model_max_length")
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def mistral_config(folder: Path) -> dict[str, Any]:
    """Return what params.json means as a config.json.

    Raises:
        CheckpointError: it lacks a setting.
        ArchitectureError: it has one that has no rule.
    """
    params = read_json(folder / PARAMS)
    tied = params.pop("tied_embeddings", False)
    longest = [params.pop(key) for key in _LONGEST if key in params]
    if unknown := [key for key in params.keys() - _SETTINGS.keys() if params[key] is not None]:
        raise ArchitectureError(
            f"{folder / PARAMS} has {min(unknown)} = {reason(repr(params[min(unknown)]), 60)}, "
            "which no rule maps: convert the Hugging Face folder of this model"
        )
    needed = _SETTINGS.keys() - {"rope_theta", "sliding_window"}
    if missing := [key for key in needed if params.get(key) is None]:
        raise CheckpointError(f"{folder / PARAMS} lacks {min(missing)}")
    found = {_SETTINGS[key]: value for key, value in params.items()}
    found = {"rope_theta": 10000.0, "sliding_window": None, **found}
    return found | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "max_position_embeddings": longest[0] if longest else 32768,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }


def mistral_tensors(
    folder: Path, file: TensorFile, config: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of a folder's open weight file as transformers has them.

    Raises:
        CheckpointError: the file is damaged.
        ArchitectureError: it holds a tensor that has no rule.
    """
    for name, (_, shape) in file.headers.items():
        parts = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
        if not parts or parts[2] not in _NAMES:
            raise ArchitectureError(
                f"{folder / CONSOLIDATED} holds {reason(name, 80)}, which no rule maps: convert "
                "the Hugging Face folder of this model"
            )
        tensor, head_dim = file.read(name), config["head_dim"]
        if parts[2] in ("attention.wq", "attention.wk"):
            if len(shape) != 2 or shape[0] % (head_dim // 2 * 2):
                raise CheckpointError(f"{folder / CONSOLIDATED}: {name} has shape {list(shape)}")
            tensor = rotated_by_halves(tensor, head_dim)
        yield f"{'model.' + parts[1] if parts[1] else ''}{_NAMES[parts[2]]}.weight", tensor
