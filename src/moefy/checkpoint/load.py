"""Models and tokenizers through transformers, with one clear error when a folder is broken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.bounded import try_added_tokens
from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.expert_layers import register
from moefy.checkpoint.reader import GENERATION, read_config, read_json, tensor_files
from moefy.checkpoint.targets import TARGETS, check_known
from moefy.errors import CheckpointError, reason
from moefy.hardware import device


def load_model(folder: str | Path, *, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """Load a dense or converted model, on the CPU, in evaluation mode.

    Where no GPU is used, experts are computed by `lean`, which answers faster there than
    transformers' own implementations.

    Args:
        folder: the model's.
        dtype: of the weights; "auto" for that of config.json.
        **options: for transformers' `from_pretrained`.

    Raises:
        CheckpointError: the folder is no model, or a damaged one.
        ArchitectureError: a model that moefy neither converts nor writes.
    """
    # before transformers, which would load a stranger, or make what the files do not hold
    folder = Path(folder).expanduser()
    config = read_config(folder)
    check_known(config.get("model_type"), folder)
    if ffn_shape(config).experts and device().type == "cpu":
        options.setdefault("experts_implementation", register())
    names = (name.split(".") for name in tensor_files(folder) if name.startswith("model.layers."))
    layers = {parts[2] for parts in names}
    if len(layers) != config["num_hidden_layers"]:
        raise CheckpointError(
            f"{folder} holds {len(layers)} layers, and config.json says num_hidden_layers = "
            f"{config['num_hidden_layers']}"
        )
    generation = mended_generation(folder)[0]
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged folder fails wherever the damage leads to
        raise CheckpointError(
            f"{folder} cannot be loaded ({reason(error)}): it is incomplete or damaged"
        ) from error
    for what, names in notes.items():  # transformers makes up what is missing, and drops the rest
        if names:
            raise CheckpointError(
                f"{folder} has {what.replace('_', ' ')}, {reason(sorted(map(str, names))[0], 80)} "
                "the first: the folder is incomplete, or config.json belongs to another model"
            )
    model.config.return_dict = True  # a config.json may say that models return tuples
    target = TARGETS.get(config.get("model_type", ""))
    if target and target.score != "softmax":
        # a fitted router's logits are near 0, and a sigmoid near 1/2 has too few digits in bfloat16
        for name, module in model.named_modules():
            if name.endswith(".gate"):
                module.forward = torch.autocast(device().type, enabled=False)(module.forward)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig(**generation)
    return model.eval()


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
    """Load the tokenizer that lies beside a model.

    Raises:
        CheckpointError: there is none, a damaged one, or that of a larger vocabulary.
    """
    from transformers import AutoTokenizer

    is_model = (folder / "config.json").is_file()
    rows = read_config(folder).get("vocab_size") if is_model else None
    try:
        try_added_tokens(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError("model_max_length is no number")
        # a special token, which many a tokenizer has without a row, comes from no text
        added = tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special}
        highest = max({*tokenizer.get_vocab().values()} - special, default=0)
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # no common type; a panic of the Rust library is no Exception
        raise CheckpointError(
            f"{folder} has no readable tokenizer ({reason(error)}): "
            "copy the dense model's tokenizer files into it"
        ) from error
    if rows and highest >= rows:
        raise CheckpointError(
            f"{folder}: its tokenizer has the id {highest:,}, and its embedding {rows:,} rows "
            "(vocab_size): put the tokenizer files of the model itself into the folder"
        )
    return tokenizer
