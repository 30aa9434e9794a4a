"""A mixture that follows the losses on held-out text (Sheared-LLaMA's dynamic batch loading)."""

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
from moefy.data.mixture import Mixture, WeightUpdate
from moefy.data.reference import published_reference, read_reference
from moefy.data.strategies import UPDATE_INTERVAL_STEPS, UPDATE_RULES
from moefy.evaluation.heldout import heldout_losses
from moefy.progress import Progress, ProgressFn
from moefy.storage import replace_file
from moefy.training.models import load_teacher
from moefy.training.processes import Processes
from moefy.training.recipe import TrainRecipe

REFERENCE = "reference.json"
Windows = Mapping[str, Int[np.ndarray, "_windows sequence"]]
"""Held-out token ids by domain."""


class Follower:
    """Renews a mixture's weights at the recipe's interval.

    Args:
        mixture: of the run.
        windows: of the domains that have weight.
        reference: nats per token by domain.
        recipe: of the run.
        processes: of the run.
    """

    def __init__(
        self,
        mixture: Mixture,
        windows: Windows,
        reference: Mapping[str, float],
        recipe: TrainRecipe,
        processes: Processes,
    ) -> None:
        self._mixture, self._windows, self._reference = mixture, windows, reference
        self._recipe, self._processes = recipe, processes
        self._interval = recipe.mixture_interval_steps or UPDATE_INTERVAL_STEPS

    def update(self, network: Any) -> WeightUpdate | None:
        """Renew the weights if that is due before the next batch, and say what they are.

        Raises:
            TrainingError: a held-out loss is not finite.
        """
        if not self._mixture.update_due(self._interval):
            return None
        losses = losses_of(network, self._windows, self._recipe, self._processes)
        rule = UPDATE_RULES[self._recipe.mixture_update]
        # the first process's, to the last bit: the processes must draw the same samples
        update = self._processes.of_first(
            lambda: self._mixture.reweight(losses, self._reference, rule)
        )
        self._mixture.set_weights(update.weights)
        return update


def losses_of(
    network: Any, windows: Windows, recipe: TrainRecipe, processes: Processes
) -> dict[str, float]:
    """Return a model's held-out loss by domain, nats per token, computed by all processes."""
    return heldout_losses(
        network,
        windows,
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
    """Return what the losses are compared with: the dense model's, published ones, or a file's.

    Args:
        windows: of the domains that have weight.
        teacher: the dense parent, if it is loaded.
        source: the model in training; published losses are chosen by its size.
        recipe: of the run.
        processes: of the run.
        report: told about the measuring.

    Raises:
        UsageError: no published losses fit.
        CorpusError: a file's domains are not the corpus's.
    """
    names = list(windows)
    if recipe.reference_losses == "published":
        config = read_config(source)
        return published_reference(
            names, num_parameters=cost(config).total_params, vocab_size=config["vocab_size"]
        )
    if recipe.reference_losses != "dense":
        return read_reference(recipe.reference_losses, names)
    assert recipe.teacher is not None  # see `checks.check_run`
    report(Progress("measure the dense model", 0, 1))
    dense = teacher or load_teacher(resolve(recipe.teacher), recipe, processes)
    losses = losses_of(dense, windows, recipe, processes)
    report(Progress("measure the dense model", 1, 1))
    return losses


def keep_reference(folder: Path, losses: Mapping[str, float]) -> None:
    """Keep what a run's losses are compared with."""
    replace_file(folder / REFERENCE, json.dumps(dict(losses), indent=2) + "\n")


def kept_reference(folder: Path) -> dict[str, float]:
    """Return what a run's losses are compared with, empty if they are with nothing."""
    file = folder / REFERENCE
    return dict(json.loads(file.read_text())) if file.is_file() else {}
