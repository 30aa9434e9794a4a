"""The log of a run: one JSON line per step, and the same numbers for a tracker."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moefy.errors import UsageError
from moefy.storage import replace_file, storage_errors
from moefy.training.recipe import TrainRecipe
from moefy.training.state import LOG, read_log


class RunLog:
    """Writes the log of a run that continues after `first_step`; used by the first process."""

    def __init__(self, folder: Path, first_step: int, recipe: TrainRecipe) -> None:
        self._file = folder / LOG
        kept = read_log(folder) if first_step else []
        kept = [line for line in kept if line["step"] <= first_step]  # later steps are done again
        replace_file(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._trackers = [_tracker(name, folder, first_step, recipe) for name in recipe.trackers]

    def write(self, line: dict[str, Any]) -> None:
        """Add a step; raise StorageError if the disk is full."""
        with storage_errors(self._file), self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            tracker.log(dict(_numbers(line)), step=line["step"])

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(recipe: TrainRecipe) -> None:
    """Raise UsageError for a tracker that is not installed."""
    for name in recipe.trackers:
        if find_spec(name) is None:
            raise UsageError(
                f"trackers: {name} is not installed: pip install {name}, or leave it out (every "
                f"step is in {LOG} anyway)"
            )


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a log line under a name as `domain_loss/wiki`; lists are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _tracker(name: str, folder: Path, first_step: int, recipe: TrainRecipe) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # which accelerate's trackers ask whether they are the first process's
    if name == "tensorboard":
        # steps that are done again replace those that were written before the run stopped
        tracker = TensorBoardTracker(name, logging_dir=folder, purge_step=first_step + 1)
    else:
        mark = folder / "wandb-run"
        if not (first_step and mark.is_file()):
            replace_file(mark, secrets.token_hex(8))
        tracker = WandBTracker(
            "moefy",
            name=folder.name,
            id=mark.read_text(),
            resume="allow",  # a run that was stopped goes on in the same plot
            dir=folder,
            config=recipe.model_dump(mode="json"),
        )
    tracker.start()
    return tracker
