"""GGUF files as sources: tensors of the gguf library, and a config of transformers.

Tensors and keys of a GGUF file that no rule maps stop the conversion.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGUFReader,
    ReaderTensor,
    dequantize,
    get_tensor_name_map,
)
from torch import Tensor

from moefy.checkpoint.meaning import meaning_of, own_keys
from moefy.checkpoint.tensor_file import rotated_by_halves
from moefy.errors import ArchitectureError, CheckpointError, MoefyError, reason

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,  # Mistral's too
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "phi3": MODEL_ARCH.PHI3,
}
"""Those that were read back exactly."""

_ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's rotary embedding, as one factor per frequency."""

_MOST_VALUES = 1 << 22
"""Values in a header, a string counted twice; the largest vocabularies need two million."""
_SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_ROTATED = ("q_proj", "k_proj")


class _CheckedReader(GGUFReader):  # type: ignore[misc]
    """gguf's reader, which by itself follows a damaged count for as long as the count says."""

    _num_values = 0

    @property
    def data(self) -> np.ndarray:
        """The file's bytes."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._bytes = np.asarray(mapped)  # of which a slice costs a third

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray:
        found = super()._get(offset, dtype, count, override_order)
        self._num_values += 1
        # a slice behind the end of the file is short in numpy, and no error
        if len(found) < count or self._num_values > _MOST_VALUES:
            raise ValueError(f"{count} values at byte {offset} of {len(self.data)}")
        return found


def is_gguf(source: str | Path) -> bool:
    """Say whether a source is a GGUF file."""
    path = Path(source).expanduser()
    return path.is_file() and path.suffix == ".gguf"


def parts(path: Path) -> list[Path]:
    """Return the files of a GGUF model, of which `path` is one.

    Raises:
        CheckpointError: one is missing.
    """
    named = _PART.fullmatch(path.name)
    if not named:
        return [path]
    count = int(named[2])
    found = [path.with_name(f"{named[1]}-{n + 1:05d}-of-{named[2]}.gguf") for n in range(count)]
    if missing := [file.name for file in found if not file.is_file()]:
        raise CheckpointError(
            f"{path} is one of {count} parts, and {missing[0]} is missing: put all of them into "
            "one folder"
        )
    return found


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, ReaderTensor]]:
    """Read the header of each part and check that it holds what it says; no tensor is read.

    Returns:
        Values of the first part by key, a tokenizer's list as its length, and tensors by name.

    Raises:
        CheckpointError: a file is no GGUF, or it is missing, truncated or damaged.
    """
    files = parts(path)
    fields: dict[str, Any] = {}
    tensors: dict[str, ReaderTensor] = {}
    for number, file in enumerate(files):
        try:
            with np.errstate(over="raise"):
                reader = _CheckedReader(file)
            if reader.byte_order != "I":
                raise ValueError("its bytes are in the order of another machine")
            found = {
                # a list of all tokens is long, and transformers' matter
                key: len(field.data)
                if key.startswith("tokenizer.") and len(field.data) > 1
                else field.contents()
                for key, field in reader.fields.items()
            }
            said = found.get("split.no", 0), found.get("split.count") or 1
            if said != (number, len(files)):
                raise ValueError(f"it says part {said[0]} of {said[1]}, counted from 0")
            if twice := tensors.keys() & {tensor.name for tensor in reader.tensors}:
                raise ValueError(f"another part holds {min(twice)} too")
        except Exception as error:  # the reader fails with whatever the damage leads to
            raise CheckpointError(
                f"{file} is no readable GGUF file ({error}): it is truncated or damaged, fetch it "
                "again"
            ) from error
        fields = fields or found
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    return fields, tensors


def own_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a header's architecture, without its name in front of them."""
    start = f"{fields.get('general.architecture')}."
    return {key.removeprefix(start): fields[key] for key in fields if key.startswith(start)}


@dataclass
class GgufModel:
    """A checked GGUF model: its config, and tensors by transformers' names."""

    path: Path
    config: Any
    tensors: dict[str, ReaderTensor]

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantised to float32."""
        stored = self.tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path} holds {stored.name} as {stored.tensor_type.name}, which the gguf "
                "library does not dequantise: take another quantisation of this model"
            ) from error
        tensor = torch.from_numpy(np.array(values, np.float32))
        if self.config.model_type in ("llama", "mistral") and name.split(".")[-2] in _ROTATED:
            tensor = rotated_by_halves(tensor, self.config.head_dim)
        return tensor


def open_gguf(path: Path) -> GgufModel:
    """Open a GGUF file, or all parts of one, and check it before anything is built from it.

    Raises:
        CheckpointError: a file is missing, truncated or damaged.
        ArchitectureError: it holds something that would be left out, or another architecture.
    """
    fields, stored = read_header(path)
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ArchitectureError(
            f"{path} has the architecture {architecture!r}; moefy reads "
            f"{', '.join(_ARCHITECTURES)} from GGUF files"
        )
    own = own_settings(fields)
    # before names are made for every layer: a damaged count may be huge
    layers = own.get("block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(stored):
        raise CheckpointError(f"{path} says {layers} layers and holds fewer tensors")
    from transformers import AutoModelForCausalLM

    factors = stored.get(_ROPE_FACTORS)
    try:
        config = _config(path, architecture, own, fields, stored)
        config.rope_parameters = _rope(path, own, config, factors)
        meaning_of(config.to_dict(), str(path))
        with torch.device("meta"):  # names and shapes alone, whatever the header asks for
            model = AutoModelForCausalLM.from_config(config)
        config.architectures, config.dtype = [type(model).__name__], torch.float32
    except MoefyError:
        raise
    except Exception as error:  # a damaged header fails wherever the damage leads to
        raise CheckpointError(
            f"{path} has a header that describes no model ({reason(error)}): it is damaged"
        ) from error
    names = get_tensor_name_map(_ARCHITECTURES[architecture], layers)
    wanted = {
        str(names.get_name(name, (".weight", ".bias"))): (name, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    if config.tie_word_embeddings:
        del wanted["output.weight"]
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, {missing[0]} the first")
    if architecture == "llama":
        wanted[_ROPE_FACTORS] = ("", (config.head_dim // 2,))
    for name, tensor in stored.items():
        if name not in wanted:
            raise ArchitectureError(
                f"{path} holds {name}, which no rule maps for {architecture}: nothing was "
                "converted, because dropping it would change the model"
            )
        if (shape := [*map(int, reversed(tensor.shape))]) != [*wanted[name][1]]:
            raise CheckpointError(
                f"{path}: {name} has shape {shape}, the header says {list(wanted[name][1])}"
            )
    return GgufModel(
        path, config, {wanted[name][0]: stored[name] for name in stored if name != _ROPE_FACTORS}
    )


def _config(
    path: Path,
    architecture: str,
    own: dict[str, Any],
    fields: dict[str, Any],
    stored: dict[str, ReaderTensor],
) -> Any:
    """Return a file's config, without its rotary scaling; a damaged header ends in any error."""
    from transformers import CONFIG_MAPPING

    heads, window = own["attention.head_count"], own.get("attention.sliding_window")
    usual = own["embedding_length"] // heads
    head_dim = own.get("attention.key_length") or usual
    rotated = own.get("rope.dimension_count", head_dim)
    has_size = "head_dim" in own_keys({"model_type": architecture})
    refused = {
        f"rotary embedding in {rotated} of {head_dim} dimensions": rotated != head_dim,
        f"a sliding window of {window} tokens": window and window < own["context_length"],
        f"heads of {head_dim}": head_dim != usual and not has_size,
    }
    for what, holds in refused.items():
        if holds:
            raise _not_expressed(path, what)
    tokens = {
        f"{key}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id")
        for key, name in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    theta = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    return CONFIG_MAPPING[architecture](
        **{key: own[name] for key, name in _SETTINGS.items()},
        **({"head_dim": head_dim} if has_size else {}),
        **tokens,
        num_key_value_heads=own.get("attention.head_count_kv", heads),
        rope_parameters=theta,
        sliding_window=None,
        tie_word_embeddings="output.weight" not in stored,
        vocab_size=int(stored["token_embd.weight"].shape[-1]),
    )


def _not_expressed(path: Path, what: str) -> ArchitectureError:
    return ArchitectureError(
        f"{path} has {what}, which moefy does not read from a GGUF file: convert the Hugging Face "
        "folder of this model"
    )


def _rope(
    path: Path, own: dict[str, Any], config: Any, factors: ReaderTensor | None
) -> dict[str, Any]:
    """Return a file's rotary settings, as llama.cpp reads them.

    Raises:
        ArchitectureError: they are not read.
    """
    plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    scaling = {k.rpartition(".")[2]: v for k, v in own.items() if k.startswith("rope.scaling.")}
    scaling.pop("finetuned", None)
    kind = scaling.pop("type", "linear")
    factor = float(scaling.pop("factor", 0) or own.get("rope.scale_linear", 0) or 1)
    original = scaling.pop("original_context_length", config.max_position_embeddings)
    betas = {key: scaling.pop(f"yarn_{key}", None) for key in ("beta_fast", "beta_slow")}
    is_scaled = kind not in ("none", "linear") or (kind == "linear" and factor != 1)
    if is_scaled and (kind not in ("linear", "yarn") or factors or scaling):
        more = sorted(scaling) or [_ROPE_FACTORS] * bool(factors)
        raise _not_expressed(path, f"the rotary scaling {', '.join([repr(kind), *more])}")
    if kind == "yarn":
        found = {"factor": factor, "original_max_position_embeddings": original}
        given = {key: value for key, value in betas.items() if value is not None}
        return {**plain, "rope_type": "yarn", **found, **given}
    if factors:
        return _llama3_rope(path, plain["rope_theta"], config, factors)
    return {**plain, "rope_type": "linear", "factor": factor} if is_scaled else plain


def _llama3_rope(path: Path, theta: float, config: Any, stored: ReaderTensor) -> dict[str, Any]:
    """Return the settings that give a file's factors, one for every frequency.

    They are 1 for short waves, the largest for long ones; between them, the share of the plain
    frequency falls linearly with it, which tells the other settings.

    Raises:
        ArchitectureError: they are not those of a Llama 3.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = torch.tensor(stored.data.tolist(), dtype=torch.float64)
    size = 2 * len(factors)
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    largest = round(float(factors.max()), 4)
    between = (factors > 1.0001) & (factors < 0.9999 * largest)
    high, original = 4.0, 8192  # of every Llama 3
    if between.sum() > 1:
        share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
        turns = plain[between] / (2 * math.pi)
        slope, start = np.polyfit(turns.numpy(), share.numpy(), 1).tolist()
        high = 1 - 1 / start  # where low_freq_factor is 1
        original = round(slope * (high - 1))
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": round(high, 3),
        "original_max_position_embeddings": original,
    }
    config.rope_parameters = rope
    frequencies: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    if not torch.allclose(plain / frequencies, factors, rtol=1e-4):
        raise _not_expressed(path, "rotary factors that are not those of a Llama 3")
    return rope
