"""Dense checkpoints, read lazily: a tensor is in memory only while somebody holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy.checkpoint.families import DenseFamily, canonical_config, dense_family, layer_shapes
from moefy.checkpoint.tensors import TensorFile, open_tensors
from moefy.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
PICKLED = "pytorch_model.bin"
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
_DTYPES = ("float32", "bfloat16", "float16")


def read_config(source: Path) -> dict[str, Any]:
    """Return a model folder's config.json (or read that file itself).

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        unfinished = (
            "; it holds an unfinished training run, which the command that began it continues"
        )
        raise CheckpointError(
            f"{source} is no model folder: it has no config.json"
            + unfinished * (source / "log.jsonl").is_file()
        )
    try:
        config = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def side_files(source: Path) -> list[Path]:
    """Return the files that travel with a model: tokenizer, templates, licences."""
    return sorted(file for glob in _SIDE_FILES for file in source.glob(glob) if file.is_file())


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a model folder's config.json and of every weight file."""
    hashes = {}
    for name in ["config.json", *weight_files(folder)]:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


class DenseCheckpoint:
    """A Hugging Face folder of a dense model, checked when it is opened.

    Opening reads the headers of all files and compares names and shapes with the family's table;
    no tensor is read. Indexing (`checkpoint["model.norm.weight"]`) reads one tensor, or the rows
    of a fused one.

    Attributes:
        config: the canonical config (see `families.canonical_config`).
        dtype: dtype of the FFN weights.

    Raises:
        CheckpointError: files are missing, truncated, or do not agree with config.json; a tensor
            that no rule maps is named.
        ArchitectureError: see `dense_family`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stored_config = read_config(folder)
        self.family: DenseFamily = dense_family(stored_config, str(folder))
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = stored_config.get(key)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(
                    f"{folder}/config.json has {key} = {value!r}: a positive integer is needed"
                )
        self.config = canonical_config(self.family, stored_config)
        shapes = layer_shapes(self.config)
        self.layer_tensors = tuple(shapes)  # without the FFN matrices
        self._files: dict[str, TensorFile] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rows: dict[str, tuple[str, slice]] = {}
        self.dtype = ""
        # all checks come before the first tensor is read
        for name in weight_files(folder):
            self._open(folder / name)
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        layer = shapes | dict.fromkeys((self.family.gate, self.family.up), (inner, hidden))
        layer[self.family.down] = (hidden, inner)
        self._split_fused(layer)
        self._check(layer)

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return self.config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return bool(self.config["tie_word_embeddings"])

    @property
    def residual_scale(self) -> float:
        """Factor with which attention and FFN enter the residual stream; Granite's is not 1."""
        return float(self.config.get("residual_multiplier", 1.0))

    def __getitem__(self, name: str) -> Tensor:
        stored, rows = self._rows.get(name, (name, None))
        return self._files[stored].read(stored, rows)

    def model_tensors(self) -> Iterator[str]:
        """Return the names outside the layers that a converted model keeps."""
        for name in self.family.model_tensors:
            if not (self.tied and name == "lm_head.weight"):
                yield name

    def total_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum((self.folder / name).stat().st_size for name in weight_files(self.folder))

    def _open(self, path: Path) -> None:
        file = open_tensors(path)
        for name, (dtype, shape) in file.headers.items():
            if dtype not in _DTYPES:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored as {dtype}; allowed are {', '.join(_DTYPES)}"
                )
            self._files[name] = file
            self._shapes[name] = shape
            if name.endswith(self.family.down):
                self.dtype = dtype

    def _split_fused(self, layer: Mapping[str, tuple[int, ...]]) -> None:
        """Give the parts of fused tensors the names that they have in other families."""
        for prefix in self._prefixes() if self.family.fused else ():
            for fused in self.family.fused:
                whole = prefix + fused.stored
                if whole not in self._shapes:
                    raise CheckpointError(f"{self.folder} lacks {whole}: the folder is incomplete")
                rows, columns = self._shapes.pop(whole)
                start = 0
                for part in fused.parts:
                    end = start + layer[part][0]
                    self._shapes[prefix + part] = (end - start, columns)
                    self._files[prefix + part] = self._files[whole]
                    self._rows[prefix + part] = (whole, slice(start, end))
                    start = end
                if start != rows:
                    raise CheckpointError(
                        f"{self.folder}: {whole} has {rows} rows, config.json says {start}"
                    )

    def _check(self, layer: Mapping[str, tuple[int, ...]]) -> None:
        """Compare all names and shapes with those of the family, `layer` being one layer's."""
        family, hidden = self.family, self.config["hidden_size"]
        matrix = (self.config["vocab_size"], hidden)
        wanted: dict[str, tuple[int, ...]]
        wanted = {n: (hidden,) if "norm" in n else matrix for n in self.model_tensors()}
        wanted |= {prefix + n: shape for prefix in self._prefixes() for n, shape in layer.items()}
        # older files hold what is computed today, and tied models may hold the output matrix
        tolerated = {prefix + name for prefix in self._prefixes() for name in family.optional}
        tolerated |= {*family.model_tensors}
        if missing := sorted(wanted.keys() - self._shapes.keys()):
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of its tensors, {missing[0]} the first: "
                "the folder is incomplete, or config.json belongs to another model"
            )
        if unmapped := sorted(
            self._shapes.keys() - wanted.keys() - tolerated - {*family.model_tensors}
        ):
            raise CheckpointError(
                f"{self.folder} holds {len(unmapped)} tensors that no rule of the "
                f"{family.model_type} family maps, {unmapped[0]} the first: nothing was converted, "
                "because dropping one would change the model"
            )
        for name, shape in wanted.items():
            if self._shapes[name] != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(self._shapes[name])}, config.json says "
                    f"{list(shape)}"
                )

    def _prefixes(self) -> list[str]:
        return [self.family.layer.format(layer=layer) for layer in range(self.num_layers)]


def weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weight files; safetensors go before `.bin`.

    Raises:
        CheckpointError: there are none, or their index is damaged.
    """
    for single in (SINGLE, PICKLED):
        if (folder / single).is_file():
            return [single]
        if (folder / f"{single}.index.json").is_file():
            return indexed_files(folder / f"{single}.index.json")
    raise CheckpointError(
        f"{folder} has a config.json but no weights: {SINGLE}, {INDEX}, {PICKLED} or its index is "
        "needed"
    )


def indexed_files(index: Path) -> list[str]:
    """Return the names of the weight files that an index names.

    Raises:
        CheckpointError: it is damaged, or names files elsewhere.
    """
    try:
        weight_map: Mapping[str, Any] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no valid weight index: {error!r}") from error
    if any(Path(str(name)).name != name for name in files):
        raise CheckpointError(f"{index} names files outside the folder")
    return files
