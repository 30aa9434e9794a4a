"""The models that are compared on the same tokens."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.checkpoint.targets import check_known
from moefy.errors import MoefyError, UsageError
from moefy.progress import ProgressFn, silent


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        name: to show.
        folder: where it lies.
        config: its config.json.
    """

    name: str
    folder: Path
    config: dict[str, Any]


def candidates_of(
    models: str | Path | Sequence[str | Path],
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> list[Candidate]:
    """Find models that read the same tokens.

    Args:
        models: model folders, or anything `convert` takes as a source.
        names: to show instead of `models`.
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
    _check_tokenizers(folders)
    return [Candidate(*each) for each in zip(shown, folders, configs, strict=True)]


def _check_tokenizers(folders: Sequence[Path]) -> None:
    """Refuse vocabularies of the same size and other tokens; a folder may have no tokenizer."""
    first = folders[0]
    others = [folder for folder in folders if not _have_one_file(first, folder)]
    vocabulary = _vocabulary(first) if others else {}
    for folder in others:
        other = _vocabulary(folder)
        if vocabulary and other and vocabulary != other:
            raise UsageError(
                f"{first} and {folder} have different tokens: only models with the same "
                "tokenizer can be compared"
            )


def _have_one_file(one: Path, other: Path) -> bool:
    files = one / "tokenizer.json", other / "tokenizer.json"
    return one == other or (
        all(file.is_file() for file in files) and filecmp.cmp(files[0], files[1], shallow=False)
    )


def _vocabulary(folder: Path) -> dict[str, int]:
    try:
        found: dict[str, int] = load_tokenizer(folder).get_vocab()
    except MoefyError:
        return {}
    return found
