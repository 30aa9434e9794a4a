"""The trained model, written as the native folder that it came from."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.reader import read_config, side_files
from moefy.storage import storage_errors
from moefy.training.workers import Workers


def write_model(
    network: Any, source: Path, out: Path, identity: dict[str, Any], workers: Workers
) -> None:
    """Put the finished model into the run's folder, config.json last.

    Weights go back to the dtype and the on-disk form of the source; its config.json is kept as it
    is, because other runtimes read spellings there that transformers would not write again.

    Raises:
        StorageError: the disk is full.
    """
    config = read_config(source)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    finished = out / ".finished"
    if workers.is_first:
        shutil.rmtree(finished, ignore_errors=True)
    workers.wait()
    with storage_errors(out):
        _cast(network, dtype).save_pretrained(finished)
        workers.wait()
        if not workers.is_first:
            return
        record = {
            "moefy": version("moefy"),
            "stage": "train",
            "run": identity,
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
            "from": json.loads((source / "moefy.json").read_text())
            if (source / "moefy.json").is_file()
            else None,
        }
        for file in side_files(source):
            shutil.copyfile(file, finished / file.name)
        (finished / "moefy.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.copyfile(source / "config.json", finished / "config.json")
        for file in sorted(finished.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(out / file.name)
        finished.rmdir()


def _cast(network: Any, dtype: torch.dtype) -> Any:
    """Round the weights; buffers, as selection biases, keep what small steps have added up to."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to(dtype)
    for name, buffer in kept.items():
        module, _, own = name.rpartition(".")
        setattr(network.get_submodule(module), own, buffer)
    return network
