"""Held-out losses, and the reference losses that a dynamic mixture compares them with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moefy.checkpoint.cost import cost
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.data.reference import published_reference, read_reference
from moefy.evaluation.heldout import heldout_losses
from moefy.progress import Progress, ProgressFn
from moefy.storage import replace_file
from moefy.training.models import load_teacher
from moefy.training.processes import Processes
from moefy.training.recipe import TrainRecipe

REFERENCE = "reference.json"
Windows = Mapping[str, Int[np.ndarray, "_windows sequence"]]
"""Held-out token ids by domain."""


def losses_of(
    network: Any,
    windows: Windows,
    recipe: TrainRecipe,
    processes: Processes,
    labels: Windows | None = None,
) -> dict[str, float]:
    """Return a model's held-out loss by domain, nats per token, computed by all processes."""
    return heldout_losses(
        network,
        windows,
        labels,
        precision=recipe.precision,
        micro_batch_size=recipe.micro_batch_size,
        data_idx=processes.data_idx,
        num_data=processes.num_data,
        total=processes.total,
    )


def reference_losses(
    windows: Windows,
    teacher: Any | None,
    source: Path,
    recipe: TrainRecipe,
    processes: Processes,
    report: ProgressFn,
) -> dict[str, float]:
    """Return the reference losses by domain: the dense model's, published ones, or a file's.

    Raises:
        UsageError: no published losses fit the source.
        CorpusError: a file's domains are not the corpus's.
    """
    names = list(windows)
    if recipe.reference_losses == "published":
        config = read_config(source)  # published losses are chosen by the size of the model
        return published_reference(
            names, num_parameters=cost(config).total_params, vocab_size=config["vocab_size"]
        )
    if recipe.reference_losses != "dense":
        return read_reference(recipe.reference_losses, names)
    assert recipe.teacher is not None  # see `checks.check_run`
    report(Progress("measure the dense model", 0, 1))
    # a teacher that runs in every step is loaded already
    dense = teacher or load_teacher(resolve(recipe.teacher), recipe, processes)
    losses = losses_of(dense, windows, recipe, processes)
    report(Progress("measure the dense model", 1, 1))
    return losses


def keep_reference(folder: Path, losses: Mapping[str, float]) -> None:
    """Keep the reference losses of a run in its folder."""
    replace_file(folder / REFERENCE, json.dumps(dict(losses), indent=2) + "\n")


def kept_reference(folder: Path) -> dict[str, float]:
    """Return the reference losses of a run, empty where it has none."""
    file = folder / REFERENCE
    return dict(json.loads(file.read_text())) if file.is_file() else {}
