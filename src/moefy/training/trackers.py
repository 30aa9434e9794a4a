"""The numbers of a run's log, sent to TensorBoard or Weights & Biases by accelerate."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moefy.errors import UsageError
from moefy.storage import replace_file
from moefy.training.recipe import TrainRecipe

_RUN = "wandb-run"  # names a run to Weights & Biases, where a stopped one goes on in its plot
FILES = (_RUN, "tensorboard", "wandb")
"""What trackers write into a run's folder."""


def check_trackers(recipe: TrainRecipe) -> None:
    """Raise UsageError for a tracker that is not installed."""
    for name in recipe.trackers:
        if find_spec(name) is None:
            raise UsageError(
                f"trackers: {name} is not installed: pip install {name}, or leave it out (every "
                "step is in log.jsonl anyway)"
            )


def open_trackers(folder: Path, first_step: int, recipe: TrainRecipe) -> list[Any]:
    """Return accelerate's trackers of a run that goes on behind `first_step`."""
    if not recipe.trackers:
        return []
    from accelerate.state import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # which the trackers ask whether they are the first process's
    mark = folder / _RUN
    if "wandb" in recipe.trackers and not (first_step and mark.is_file()):
        replace_file(mark, secrets.token_hex(8))
    found: list[Any] = []
    for name in recipe.trackers:
        if name == "tensorboard":
            # steps that are done again replace those that were written before the run stopped
            found.append(TensorBoardTracker(name, logging_dir=folder, purge_step=first_step + 1))
        else:
            settings = {"name": folder.name, "id": mark.read_text(), "resume": "allow"}
            config = recipe.model_dump(mode="json")
            found.append(WandBTracker("moefy", dir=folder, config=config, **settings))
        found[-1].start()
    return found


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a log line under a name as `domain_loss/wiki`; lists are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)
