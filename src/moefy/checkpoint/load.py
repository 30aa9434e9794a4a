"""Models and tokenizers through transformers, with one clear error when a folder is broken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moefy.checkpoint.reader import GENERATION, read_config, read_json
from moefy.checkpoint.targets import check_known
from moefy.errors import CheckpointError, reason


def load_model(folder: Path, *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a dense or converted model, on the CPU, in evaluation mode, weights of `dtype`.

    Raises:
        CheckpointError: the folder is no model, or a damaged one.
        ArchitectureError: a model that moefy neither converts nor writes.
    """
    # before transformers, which would load a stranger or end in an error about a missing key
    check_known(read_config(folder).get("model_type"), folder)
    from transformers import AutoModelForCausalLM, GenerationConfig

    generation = GenerationConfig(**mended_generation(folder)[0])
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({reason(error)}): it is incomplete or damaged"
        ) from error
    if (folder / GENERATION).is_file():
        model.generation_config = generation
    return model


def mended_generation(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return generation_config.json in a form that transformers saves, and the keys left out.

    Those keys mean nothing beside the others (`temperature` where nothing is sampled), and
    transformers refuses to save them, which a training would see at its end.

    Raises:
        CheckpointError: transformers cannot read the file.
    """
    from transformers import GenerationConfig

    file = folder / GENERATION
    settings = read_json(file) if file.is_file() else {}
    left_out: list[str] = []
    while True:
        try:
            GenerationConfig(**settings).validate(strict=True)
            return settings, left_out
        except Exception as error:
            # a line of the message for each key that means nothing
            unused = set(re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)) & settings.keys()
            if not unused:
                raise CheckpointError(
                    f"{file} is refused by transformers: {reason(error)}"
                ) from error
        left_out += sorted(unused)
        settings = {key: value for key, value in settings.items() if key not in unused}


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
