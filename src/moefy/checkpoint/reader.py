"""Dense checkpoints, read lazily: a tensor is in memory only while somebody holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moefy.checkpoint.families import DenseFamily, dense_family
from moefy.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(source: Path) -> dict[str, Any]:
    """Return a model folder's config.json (or read that file itself).

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise CheckpointError(
            f"{source} is no model folder: it has no config.json" + _unfinished(source)
        )
    try:
        config = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def _unfinished(folder: Path) -> str:
    if folder.is_dir() and (folder / "recipe.yaml").is_file():
        return (
            "; it holds an unfinished training run, which the same `moefy train` command continues"
        )
    return ""


def side_files(source: Path) -> list[Path]:
    """Return the files that travel with a model: tokenizer, templates, licences."""
    return sorted(file for glob in _SIDE_FILES for file in source.glob(glob) if file.is_file())


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a model folder's config.json and of every weight file."""
    hashes = {}
    for name in ["config.json", *_weight_files(folder)]:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


class DenseCheckpoint:
    """A Hugging Face folder of a dense model, checked when it is opened.

    Opening reads the headers of all files and compares names and shapes with the family's table;
    no tensor is read. Indexing (`checkpoint["model.norm.weight"]`) reads one tensor.

    Args:
        folder: holds config.json and safetensors, single or sharded.

    Raises:
        CheckpointError: files are missing, truncated, or do not agree with config.json; a tensor
            that no rule maps is named.
        ArchitectureError: see `dense_family`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.family: DenseFamily = dense_family(self.config, str(folder))
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = self.config.get(key)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(
                    f"{folder}/config.json has {key} = {value!r}: a positive integer is needed"
                )
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.dtype = ""
        for name in _weight_files(folder):
            self._open(folder / name)
        self._check_names()
        self._check_shapes()

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return self.config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def model_tensors(self) -> Iterator[str]:
        """Return the names outside the layers that a converted model keeps."""
        for name in self.family.model_tensors:
            if not (self.tied and name == "lm_head.weight"):
                yield name

    def total_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum((self.folder / name).stat().st_size for name in _weight_files(self.folder))

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                view = file.get_slice(name)
                self._files[name] = file
                self._shapes[name] = tuple(view.get_shape())
                self._note_dtype(name, view.get_dtype())
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing: the folder is incomplete, fetch it again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): it is truncated or damaged, fetch it again"
            ) from error

    def _note_dtype(self, name: str, dtype: str) -> None:
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.folder}: {name} is stored as {dtype}; allowed are {', '.join(_DTYPES)}"
            )
        if self.family.down in name:
            self.dtype = _DTYPES[dtype]

    def _check_names(self) -> None:
        family = self.family
        behind_prefix = {family.gate, family.up, family.down, *family.layer_tensors}
        expected = set(self.model_tensors()) | {
            family.layer.format(layer=layer) + name
            for layer in range(self.num_layers)
            for name in behind_prefix
        }
        tolerated = set(family.model_tensors) | {
            family.layer.format(layer=layer) + name
            for layer in range(self.num_layers)
            for name in family.optional
        }
        if missing := sorted(expected - self._shapes.keys()):
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of its tensors, {missing[0]} the first: "
                "the folder is incomplete, or config.json belongs to another model"
            )
        if unmapped := sorted(self._shapes.keys() - expected - tolerated):
            raise CheckpointError(
                f"{self.folder} holds {len(unmapped)} tensors that no rule of the "
                f"{family.model_type} family maps, {unmapped[0]} the first: nothing was converted, "
                "because dropping one would change the model"
            )

    def _check_shapes(self) -> None:
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        wanted = {
            self.family.gate: (inner, hidden),
            self.family.up: (inner, hidden),
            self.family.down: (hidden, inner),
            self.family.ffn_norm: (hidden,),
        }
        for layer in range(self.num_layers):
            for name, shape in wanted.items():
                full = self.family.layer.format(layer=layer) + name
                if self._shapes[full] != shape:
                    raise CheckpointError(
                        f"{self.folder}: {full} has shape {list(self._shapes[full])}, "
                        f"config.json says {list(shape)}"
                    )


def _weight_files(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has a config.json but no weights: {SINGLE} or {INDEX} is needed"
        )
    try:
        index: Mapping[str, Any] = json.loads((folder / INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is no valid weight index: {error!r}") from error
    if any(Path(str(name)).name != name for name in files):
        raise CheckpointError(f"{folder / INDEX} names files outside the folder")
    return files
