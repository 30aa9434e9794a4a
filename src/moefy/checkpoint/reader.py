"""Checkpoints and their weight files, read lazily.

A file's header is read when it is opened, a tensor when it is asked for; it is in memory only while
somebody holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.families import (
    FAMILIES,
    WHOLES,
    DenseFamily,
    dense_config,
    layer_shapes,
    text_part,
)
from moefy.checkpoint.meaning import meaning_of
from moefy.checkpoint.targets import TARGETS
from moefy.checkpoint.tensor_file import WEIGHT_DTYPES, TensorFile, open_tensors
from moefy.checkpoint.whole import VISION, WHOLE, check_vision
from moefy.errors import CheckpointError, reason
from moefy.storage import cache_folder, known_sha256

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
PICKLED = "pytorch_model.bin"
GENERATION = "generation_config.json"
SUMS = "source-sha256.json"
"""In a copy of moefy's cache: SHA-256 of the files that it was made of, by name."""
_SIDE_FILES = (
    GENERATION,
    "tokenizer*",
    "*processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
_MOST_JSON_BYTES = 32 << 20  # the index of the largest model has 9 MB


def read_config(source: Path) -> dict[str, Any]:
    """Return a model folder's config.json (or read that file itself), as transformers reads it.

    A file of an architecture that moefy does not know is returned as it is.

    Raises:
        CheckpointError: there is none, or it means no model.
    """
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        message = f"{source} is no model folder: it has no config.json"
        if (source / "log.jsonl").is_file():
            message += (
                "; it holds an unfinished training run, which the command that began it continues"
            )
        raise CheckpointError(message)
    config = read_json(file)
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{file}: model_type is {reason(repr(model_type))}; it must be the name of an "
            "architecture, in quotes"
        )
    return meaning_of(config, str(file)) if model_type in {**FAMILIES, **TARGETS} else config


def read_json(file: Path) -> dict[str, Any]:
    """Return the object of a model's JSON file, in bounded time and memory.

    Raises:
        CheckpointError: it cannot be read, is no JSON object, or holds what no such file needs:
            `_MOST_JSON_BYTES`, deep nesting, numbers of thousands of digits.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_JSON_BYTES + 1)
        if len(content) > _MOST_JSON_BYTES:
            raise ValueError(f"it is larger than {_MOST_JSON_BYTES >> 20} MiB")
        found = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {reason(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return found


def side_files(source: Path) -> list[Path]:
    """Return the files that travel with a model: tokenizer, templates, licences.

    Raises:
        CheckpointError: one is a link to a file elsewhere, which would be copied and published.
    """
    files = sorted(file for glob in _SIDE_FILES for file in source.glob(glob) if file.is_file())
    root = source.resolve()
    if root.parent.name == "snapshots":  # of the hub's cache, whose files are links to its blobs
        root = root.parents[1]
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside of the model: put the file itself "
                "into the folder"
            )
    return files


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a model folder's config.json and of every weight file.

    Of a copy in moefy's cache they are those of the source's files, which are known already.
    """
    if folder.parent == cache_folder() / "models" and (folder / SUMS).is_file():
        return read_json(folder / SUMS)
    return {name: known_sha256(folder / name) for name in ["config.json", *weight_files(folder)]}


def weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weight files; safetensors go before `.bin`."""
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
    """Return the names of the weight files that an index names."""
    weight_map = read_json(index).get("weight_map")
    files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not files:
        raise CheckpointError(f"{index} is no weight index: it names no file in weight_map")
    # also the names `.` and ``, and those that the system does not take
    if outside := [name for name in files if Path(name).name != name or "\0" in name]:
        raise CheckpointError(f"{index} names {reason(outside[0], 60)}, no file of the folder")
    return sorted(files)


def tensor_files(folder: Path) -> dict[str, TensorFile]:
    """Return the open weight file of every tensor of a folder.

    Raises:
        CheckpointError: a file cannot be read, or two hold a tensor of the same name.
    """
    found: dict[str, TensorFile] = {}
    for name in weight_files(folder):
        file = open_tensors(folder / name)
        if twice := sorted(found.keys() & file.headers.keys()):
            raise CheckpointError(f"{folder} holds {twice[0]} twice, the second time in {name}")
        found |= dict.fromkeys(file.headers, file)
    return found


def _is_of_text(name: str) -> bool:
    return "language_model." in name or name.startswith("lm_head.")


class _TextFile(TensorFile):
    """The tensors of a vision-language model's text model, by their names in that alone."""

    def __init__(self, file: TensorFile) -> None:
        self._file, self._names = file, {}
        for name in file.headers:
            if _is_of_text(name):
                self._names[name.replace("language_model.", "", 1)] = name
        self.headers = {name: file.headers[stored] for name, stored in self._names.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""
        return self._file.read(self._names[name], rows)


def stored_form(family: DenseFamily, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors as its dense family stores them, names behind the layer prefix."""
    # Phi-3 stores q, k and v as one tensor, their rows below each other
    stored = dict(tensors)
    for name, parts in family.fused.items():
        stored[name] = torch.cat([stored.pop(part) for part in parts])
    return stored


class DenseCheckpoint:
    """A Hugging Face folder of a dense model, checked when it is opened.

    Opening reads the headers of all files and compares names and shapes with the family's table;
    no tensor is read. Indexing (`checkpoint["model.norm.weight"]`) reads one tensor, or the rows
    of a fused one. `part` is that of `text_part`.

    Raises:
        CheckpointError: files are missing, truncated, or do not agree with config.json; a tensor
            that no rule maps is named.
        ArchitectureError: see `dense_family`.
    """

    def __init__(self, folder: Path, part: str | None = None) -> None:
        self.folder = folder
        read = read_config(folder)
        config = text_part(read, part, str(folder))
        self.config = dense_config(config, str(folder))
        is_whole = not part and read.get("model_type") in WHOLES
        self.family: DenseFamily = FAMILIES[self.config["model_type"]]
        self.num_layers: int = self.config["num_hidden_layers"]
        self._layers = [layer_shapes(self.config, idx) for idx in range(self.num_layers)]
        # factor with which attention and FFN enter the residual stream; Granite's is not 1
        self.residual_scale = float(self.config.get("residual_multiplier", 1.0))
        self._rows: dict[str, tuple[str, slice]] = {}
        # all checks come before the first tensor is read, but for that of a second output matrix
        self._files = tensor_files(folder)
        # of a whole: what is copied as it is
        self.vision_files: dict[str, TensorFile] = {}
        if part or is_whole:
            everything = self._files
            texts = map(_TextFile, set(self._files.values()))
            self._files = {name: file for file in texts for name in file.headers}
        if is_whole:
            self.config[WHOLE] = read
            rest = {n: f for n, f in everything.items() if not _is_of_text(n)}
            check_vision(read, {n: f.headers[n][1] for n, f in rest.items()}, str(folder))
            self.vision_files = {n: f for n, f in rest.items() if n.startswith(VISION)}
        self._shapes = {name: file.headers[name][1] for name, file in self._files.items()}
        self._split_fused()
        self._check()
        embedding, head = self.family.model_tensors[0], self.family.model_tensors[-1]
        # the output matrix is the embedding; where both are stored and differ, no loader ties them
        self.tied = bool(self.config["tie_word_embeddings"])
        if self.tied and head in self._shapes and not torch.equal(self[embedding], self[head]):
            self.tied = self.config["tie_word_embeddings"] = False
        # names outside the layers that a converted model keeps
        self.model_tensors = [n for n in self.family.model_tensors if not (self.tied and n == head)]
        # that of the weights when the model is loaded: without a word in config.json, the widest
        names = [name for name in self._shapes if name.endswith(".weight")]
        self.dtype: str = self.config["dtype"] or str(self.stored_dtype(*names))[6:]

    def __getitem__(self, name: str) -> Tensor:
        stored, rows = self._rows.get(name, (name, None))
        return self._files[stored].read(stored, rows)

    def outside_layers(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and tensors that a converted model keeps as they are."""
        yield from ((name, self[name]) for name in self.model_tensors)
        yield from ((name, file.read(name)) for name, file in self.vision_files.items())

    def layer_tensors(self, layer_idx: int) -> list[str]:
        """Return the names of a layer's tensors but for the FFN's three matrices."""
        ffn = (self.family.gate, self.family.up, self.family.down)
        return [name for name in self._layers[layer_idx] if name not in ffn]

    def stored_dtype(self, *names: str) -> torch.dtype:
        """Return the dtype that holds all of these tensors exactly."""
        return reduce(torch.promote_types, (getattr(torch, self._stored_as(n)) for n in names))

    def total_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum((self.folder / name).stat().st_size for name in weight_files(self.folder))

    def _split_fused(self) -> None:
        """Give the parts of fused tensors the names that they have in other families."""
        layers = zip(self._prefixes(), self._layers, strict=True)
        for prefix, layer in layers if self.family.fused else ():
            for stored, parts in self.family.fused.items():
                whole = prefix + stored
                if whole not in self._shapes:
                    raise CheckpointError(f"{self.folder} lacks {whole}: the folder is incomplete")
                rows, columns = self._shapes.pop(whole)
                start = 0
                for part in parts:
                    end = start + layer[part][0]
                    self._shapes[prefix + part] = (end - start, columns)
                    self._files[prefix + part] = self._files[whole]
                    self._rows[prefix + part] = (whole, slice(start, end))
                    start = end
                if start != rows:
                    raise CheckpointError(
                        f"{self.folder}: {whole} has {rows} rows, config.json says {start}"
                    )

    def _check(self) -> None:
        """Compare all names and shapes with those of the family."""
        family, hidden = self.family, self.config["hidden_size"]
        matrix = (self.config["vocab_size"], hidden)
        wanted: dict[str, tuple[int, ...]]
        wanted = {n: (hidden,) if "norm" in n else matrix for n in family.model_tensors}
        if self.config["tie_word_embeddings"] and "lm_head.weight" not in self._shapes:
            del wanted["lm_head.weight"]
        for prefix, layer in zip(self._prefixes(), self._layers, strict=True):
            wanted |= {prefix + n: shape for n, shape in layer.items()}
        if missing := sorted(wanted.keys() - self._shapes.keys()):
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of its tensors, {missing[0]} the first: "
                "the folder is incomplete, or config.json belongs to another model"
            )
        # older files hold buffers that every loader computes anew
        unmapped = sorted(
            name
            for name in self._shapes.keys() - wanted.keys()
            if not name.endswith("rotary_emb.inv_freq")
        )
        if unmapped:
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
            if (dtype := self._stored_as(name)) not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored as {dtype}; allowed are "
                    f"{', '.join(WEIGHT_DTYPES)}"
                )

    def _stored_as(self, name: str) -> str:
        stored, _ = self._rows.get(name, (name, None))
        return self._files[stored].headers[stored][0]

    def _prefixes(self) -> list[str]:
        return [self.family.layer.format(layer=layer) for layer in range(self.num_layers)]
