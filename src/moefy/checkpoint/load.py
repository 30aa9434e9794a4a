"""Models and tokenizers through transformers, with one clear error when a folder is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moefy.checkpoint.reader import read_config
from moefy.checkpoint.targets import check_known
from moefy.errors import CheckpointError


def load_model(folder: Path, *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a dense or converted model, on the CPU, in evaluation mode, weights of `dtype`.

    Raises:
        CheckpointError: the folder is no model, or a damaged one.
        ArchitectureError: a model that moefy neither converts nor writes.
    """
    # before transformers, which would load a stranger or end in an error about a missing key
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
    """Load the tokenizer that lies beside a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizer libraries have no common error type
        raise CheckpointError(
            f"{folder} has no readable tokenizer ({str(error).partition(chr(10))[0]}): "
            "copy the dense model's tokenizer files into it"
        ) from error
