"""Writes a trained or tuned model in the form of the folder that it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.card import model_card
from moefy.checkpoint.reader import read_config, side_files
from moefy.checkpoint.source import origin
from moefy.run_folder import RunFolder
from moefy.storage import storage_errors
from moefy.training.processes import Processes
from moefy.training.state import FINISHED


def write_model(
    network: Any,
    source: Path,
    folder: RunFolder,
    record: dict[str, Any],
    processes: Processes,
    *,
    amend: Callable[[Path], None] = lambda _: None,
) -> None:
    """Put the finished model into the run's folder, in the dtype and the form of its source.

    Args:
        network: plain, without adapters.
        source: the folder it came from.
        folder: of the run.
        record: goes into moefy.json, between moefy's version and the source's own record.
        processes: of the run.
        amend: changes the folder of weights and tokenizer before it is moved into place.

    Raises:
        StorageError: the disk is full.
    """
    config = read_config(source)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    finished = folder.work / FINISHED
    if processes.is_first:
        shutil.rmtree(finished, ignore_errors=True)
    processes.wait()
    with storage_errors(finished):
        _round_weights(network, dtype)
        head = network.get_output_embeddings()
        if head.weight is network.get_input_embeddings().weight:
            head.weight = None  # a tied one, gathered from several processes, is written twice
        network.save_pretrained(finished)  # all processes gather
    processes.wait()

    def complete() -> None:
        with storage_errors(finished):
            earlier = source / "moefy.json"
            came_from = json.loads(earlier.read_text()) if earlier.is_file() else None
            whole = {"moefy": version("moefy"), **record, "from": came_from}
            for file in side_files(source):
                shutil.copyfile(file, finished / file.name)
            amend(finished)
            card = model_card(whole, config, None if came_from else origin(source, source))
            (finished / "README.md").write_text(card)
            (finished / "moefy.json").write_text(json.dumps(whole, indent=2) + "\n")
            # other runtimes read spellings in it that transformers would not write again
            shutil.copyfile(source / "config.json", finished / "config.json")
        folder.publish(finished)

    processes.of_first(complete)


def _round_weights(network: Any, dtype: torch.dtype) -> None:
    """Round the weights; buffers, as selection biases, keep what small steps have added up to."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to(dtype)
    for name, buffer in kept.items():
        module, _, own = name.rpartition(".")
        setattr(network.get_submodule(module), own, buffer)
