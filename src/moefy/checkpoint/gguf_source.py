"""GGUF in: which files transformers reads exactly, and what it leaves out.

transformers skips tensors and keys of a GGUF file that it does not know; here they stop the
conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType
from torch import Tensor

from moefy.errors import ArchitectureError, CheckpointError

_ATTENTION = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
_LAYER = ("attn_norm.weight", "attn_output.weight", "ffn_norm.weight", "ffn_down.weight")
_GATED = ("ffn_gate.weight", "ffn_up.weight")

GGUF_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": (*_ATTENTION, *_GATED),
    "qwen2": (*_ATTENTION, "attn_q.bias", "attn_k.bias", "attn_v.bias", *_GATED),
    "qwen3": (*_ATTENTION, "attn_q_norm.weight", "attn_k_norm.weight", *_GATED),
    "phi3": ("attn_qkv.weight", "ffn_up.weight"),
}
"""Those that were read back exactly, and the tensors of a layer besides `_LAYER`.

In GGUF, Mistral's is llama.
"""

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's rotary embedding, as one factor per frequency."""

_MOST_VALUES = 1 << 23
"""Values in a header, a string counted twice; the largest vocabularies need two million."""


@dataclass(frozen=True)
class GgufHeader:
    """Values by key, an array as its length, and shapes by tensor, rows first as torch has them."""

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


class _CheckedReader(GGUFReader):  # type: ignore[misc]
    """gguf's reader, which by itself follows a damaged count for as long as the count says."""

    _num_values = 0

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray:
        found = super()._get(offset, dtype, count, override_order)
        self._num_values += 1
        # a slice behind the end of the file is short in numpy, and no error
        if len(found) < count or self._num_values > _MOST_VALUES:
            raise ValueError(f"{count} values at byte {offset} of {len(self.data)}")
        return found


def read_header(path: Path) -> GgufHeader:
    """Read a header and check that the file holds what it says; no tensor is read.

    Raises:
        CheckpointError: the file is no GGUF, or it is truncated or damaged.
    """
    try:
        with np.errstate(over="raise"):
            reader = _CheckedReader(path)
        if reader.byte_order != "I":
            raise ValueError("its bytes are in the order of another machine")
        fields = {
            key: len(field.data) if field.types[0] == GGUFValueType.ARRAY else field.contents()
            for key, field in reader.fields.items()
        }
    except Exception as error:  # the reader fails with whatever the damage leads to
        raise CheckpointError(
            f"{path} is no readable GGUF file ({error}): it is truncated or damaged, fetch it again"
        ) from error
    shapes = {t.name: tuple(map(int, reversed(t.shape))) for t in reader.tensors}
    return GgufHeader(fields, shapes)


def check_gguf(path: Path) -> bool:
    """Check a GGUF file before anything is built from it.

    Returns:
        Whether it has `ROPE_FACTORS`.

    Raises:
        CheckpointError: the file is truncated or damaged.
        ArchitectureError: it holds something that would be left out, or another architecture.
    """
    header = read_header(path)
    architecture = header.fields.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise ArchitectureError(
            f"{path} has the architecture {architecture!r}; moefy reads "
            f"{', '.join(GGUF_ARCHITECTURES)} from GGUF files"
        )
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.fields.items()
        if key.startswith(f"{architecture}.")
    }
    sizes = _sizes(path, own)
    _check_settings(path, own, architecture, sizes)
    vocab = own.get("vocab_size", header.fields.get("tokenizer.ggml.tokens"))
    _check_tensors(path, header.shapes, architecture, sizes | {"vocab": vocab})
    return ROPE_FACTORS in header.shapes


def _sizes(path: Path, own: dict[str, Any]) -> dict[str, int]:
    keys = {
        "layers": "block_count",
        "hidden": "embedding_length",
        "inner": "feed_forward_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
    }
    found: dict[str, Any] = {name: own.get(key) for name, key in keys.items()}
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    for name, value in found.items():
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path} has {keys[name]} = {value!r}")
    head_dim = own.get("attention.key_length") or found["hidden"] // found["heads"]
    return found | {"head_dim": head_dim}


def _check_settings(
    path: Path, own: dict[str, Any], architecture: str, sizes: dict[str, int]
) -> None:
    """Refuse the keys that transformers does not read where they change the model."""
    head_dim = sizes["head_dim"]
    rotated = own.get("rope.dimension_count", head_dim)
    window, longest = own.get("attention.sliding_window"), own.get("context_length")
    scaling = own.get("rope.scaling.type", "none")
    # of these architectures transformers reads the size of heads for llama alone
    only_head = 128 if architecture == "qwen3" else sizes["hidden"] // sizes["heads"]
    refused = {
        f"the rotary scaling {scaling!r}": scaling != "none",
        "a linear rotary scaling": own.get("rope.scale_linear", 1.0) != 1.0,
        f"rotary embedding in {rotated} of {head_dim} dimensions": rotated != head_dim,
        f"a sliding window of {window} tokens": window and not (longest and window >= longest),
        f"heads of {head_dim}": architecture != "llama" and head_dim != only_head,
    }
    for what, holds in refused.items():
        if holds:
            raise ArchitectureError(
                f"{path} has {what}, which transformers does not read from a GGUF file: convert "
                "the Hugging Face folder of this model"
            )


def _check_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], architecture: str, sizes: dict[str, Any]
) -> None:
    """Compare names and shapes with the keys, so that no key can ask for more than the file has."""
    hidden, inner, head_dim = sizes["hidden"], sizes["inner"], sizes["head_dim"]
    queries, keys = sizes["heads"] * head_dim, sizes["kv_heads"] * head_dim
    is_fused = architecture == "phi3"
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q_norm.weight": (head_dim,),
        "attn_k_norm.weight": (head_dim,),
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden),
        "attn_q.bias": (queries,),
        "attn_k.bias": (keys,),
        "attn_v.bias": (keys,),
        "attn_qkv.weight": (queries + 2 * keys, hidden),
        "attn_output.weight": (hidden, queries),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (2 * inner if is_fused else inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    # before names are made for every layer: a damaged count may be huge
    if sizes["layers"] > len(shapes):
        raise CheckpointError(f"{path} says {sizes['layers']} layers and holds fewer tensors")
    matrix = sizes["vocab"], hidden
    expected = {"token_embd.weight": matrix, "output_norm.weight": (hidden,)} | {
        f"blk.{layer_idx}.{name}": layer[name]
        for layer_idx in range(sizes["layers"])
        for name in (*_LAYER, *GGUF_ARCHITECTURES[architecture])
    }
    optional: dict[str, tuple[int, ...]] = {"output.weight": matrix}
    if architecture == "llama":
        optional[ROPE_FACTORS] = (head_dim // 2,)
    for name, shape in shapes.items():
        wanted = expected.get(name, optional.get(name))
        if wanted is None:
            raise ArchitectureError(
                f"{path} holds {name}, which no rule maps for {architecture}: nothing was "
                "converted, because dropping it would change the model"
            )
        if shape != wanted:
            raise CheckpointError(
                f"{path}: {name} has shape {list(shape)}, the header says {list(wanted)}"
            )
    if missing := sorted(expected.keys() - shapes.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, {missing[0]} the first")


def llama3_rope(path: Path, config: Any) -> dict[str, Any]:
    """Return the rotary settings that give a file's `ROPE_FACTORS`.

    The factor is the largest of them; the other three settings are those of every Llama 3.

    Raises:
        ArchitectureError: those settings give other factors.
    """
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tensors = GGUFReader(path).tensors
    factors = torch.tensor(next(t.data for t in tensors if t.name == ROPE_FACTORS).tolist())
    theta = config.rope_parameters["rope_theta"]
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = rope
    frequencies: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    plain = theta ** -(torch.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    if not torch.allclose(plain / frequencies, factors, rtol=1e-4):
        raise ArchitectureError(
            f"{path} has rotary factors that are not those of a Llama 3: convert the Hugging Face "
            "folder of this model"
        )
    return rope
