"""The models that are compared on the same tokens."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.checkpoint.targets import check_known
from moefy.errors import MoefyError, UsageError
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn, silent


@dataclass(frozen=True)
class ComparedModel:
    """One of several models with the same tokenizer."""

    name: str  # shown in tables
    folder: Path
    config: dict[str, Any]  # of config.json

    def load(self, report: ProgressFn) -> Any:
        """Return the model in float32 on the device."""
        report(Progress("load", 0, 1, self.name))
        network = load_model(self.folder, dtype=torch.float32).to(device())
        report(Progress("load", 1, 1, self.name))
        return network


def compared_models(
    models: str | Path | Sequence[str | Path],
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> list[ComparedModel]:
    """Find models that read the same tokens.

    Args:
        models: model folders, or anything `convert` takes as a source.
        names: shown instead of `models`.
        report: told about progress.

    Raises:
        UsageError: there is none, a model is not usable, or their tokenizers differ.
        ArchitectureError: a model that moefy neither converts nor writes.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    if not given:
        raise UsageError("name at least one model")
    shown = list(names) if names else [str(model) for model in given]
    folders = [resolve(model, report=report) for model in given]
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        check_known(config.get("model_type"), folder)
    vocabs = {config["vocab_size"] for config in configs}
    if len(vocabs) > 1:
        raise UsageError(
            f"the models' vocabularies have {', '.join(map(str, sorted(vocabs)))} tokens: only "
            "models with the same tokenizer can be compared"
        )
    first = folders[0]
    for folder in folders[1:]:
        one, other = first / "tokenizer.json", folder / "tokenizer.json"
        # what transformers makes of one file may depend on the architecture beside it
        if one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False):
            continue
        vocabularies = [_vocabulary(each) for each in (first, folder)]
        if all(vocabularies) and vocabularies[0] != vocabularies[1]:
            raise UsageError(
                f"{first} and {folder} have different tokens: only models with the same "
                "tokenizer can be compared"
            )
    return [ComparedModel(*each) for each in zip(shown, folders, configs, strict=True)]


def _vocabulary(folder: Path) -> dict[str, int]:
    """Return the tokens of a model; none where it has no tokenizer, which is an error elsewhere."""
    try:
        found: dict[str, int] = load_tokenizer(folder).get_vocab()
    except MoefyError:
        return {}
    return found
