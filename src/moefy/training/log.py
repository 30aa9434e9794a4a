"""A run's log: one JSON line a step, and the same numbers to a tracker that is installed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moefy.errors import UsageError
from moefy.storage import replace_file, storage_errors
from moefy.training.recipe import TrainRecipe
from moefy.training.state import LOG


class RunLog:
    """Writes `log.jsonl`; used by one process.

    Args:
        out: the run's folder.
        kept: lines of the steps before this process's first.
        recipe: which trackers follow, and what they show as settings.

    Raises:
        UsageError: a tracker is not installed.
    """

    def __init__(self, out: Path, kept: list[dict[str, Any]], recipe: TrainRecipe) -> None:
        self._file = out / LOG
        replace_file(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._trackers = [_TRACKERS[name](out, recipe, len(kept)) for name in recipe.trackers]

    def write(self, line: dict[str, Any]) -> None:
        """Add a step.

        Raises:
            StorageError: the disk is full.
        """
        with storage_errors(self._file), self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        numbers = dict(_numbers(line))
        for tracker in self._trackers:
            tracker.write(numbers, line["step"])

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._trackers:
            tracker.close()


def check_trackers(recipe: TrainRecipe) -> None:
    """Refuse a tracker that is not installed, before any work is done.

    Raises:
        UsageError: it is not.
    """
    for name in recipe.trackers:
        try:
            __import__(name)
        except ImportError:
            raise UsageError(
                f"trackers: {name} is not installed: pip install {name}, or leave it out (every "
                f"step is in {LOG} anyway)"
            ) from None


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Give every single number of a log line, as `domain_loss/wiki`; lists are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


class _TensorBoard:
    def __init__(self, out: Path, recipe: TrainRecipe, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # steps that are done again replace those that were written before the run stopped
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=steps + 1)
        self._writer.add_text("recipe", f"```yaml\n{recipe.to_yaml()}```")

    def write(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, out: Path, recipe: TrainRecipe, steps: int) -> None:
        import wandb

        mark = out / "wandb-run"
        if not (steps and mark.is_file()):
            replace_file(mark, secrets.token_hex(8))
        self._run = wandb.init(
            project="moefy",
            name=out.name,
            id=mark.read_text(),
            resume="allow",  # a run that was stopped goes on in the same plot
            dir=out,
            config=recipe.model_dump(mode="json"),
        )

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, type[_TensorBoard | _WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
