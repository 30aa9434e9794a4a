"""Models and tokenizers through transformers, with one clear error when a folder is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moefy.checkpoint.reader import read_config
from moefy.checkpoint.targets import check_known
from moefy.errors import CheckpointError


def device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_precision(asked: str) -> str:
    """Return what matrix products are trained in.

    Args:
        asked: float32, bfloat16, or auto: bfloat16 where the processor computes in it.
    """
    if asked != "auto":
        return asked
    if device().type == "cuda":
        return "bfloat16"
    flags = Path("/proc/cpuinfo")
    has_bf16 = flags.is_file() and "avx512_bf16" in flags.read_text()
    return "bfloat16" if has_bf16 else "float32"


def products_in(precision: str, place: torch.device) -> torch.autocast:
    """Return what makes matrix products run in a precision, the weights staying as they are.

    Args:
        precision: float32 or bfloat16.
        place: where they run.
    """
    return torch.autocast(place.type, torch.bfloat16, enabled=precision == "bfloat16")


def load_model(folder: Path, *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a dense or converted model, on the CPU, in evaluation mode.

    Args:
        folder: of the model.
        dtype: of the weights in memory.
        **options: of transformers' `from_pretrained`.

    Raises:
        CheckpointError: the folder is no model, or a damaged one.
        ArchitectureError: a model that moefy neither converts nor writes.
    """
    check_known(read_config(folder).get("model_type"), folder)
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder} cannot be loaded ({first_line}): it is incomplete or damaged"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizer libraries have no common error type
        raise CheckpointError(
            f"{folder} has no readable tokenizer ({str(error).partition(chr(10))[0]}): "
            "copy the dense model's tokenizer files into it"
        ) from error
