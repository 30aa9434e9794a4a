"""What a report holds, and where and with what it was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefy.data.domains import Side
from moefy.errors import CheckpointError
from moefy.evaluation.compare import Comparison, Result
from moefy.evaluation.routing import RoutingResult
from moefy.evaluation.suite import SuiteResult
from moefy.hardware import device
from moefy.training.state import LOG, read_log

SPLIT_NAMES: dict[Side, str] = {"heldout": "held-out", "train": "training", "all": "all"}
"""What a split's documents are called."""


@dataclass(frozen=True)
class Report:
    """What was measured, and where it was written."""

    folder: Path  # holds the page, results.json, results.md, every figure as PNG and CSV
    comparison: Comparison
    suite: SuiteResult | None  # of the same models in the same order; None if not asked for
    routing: RoutingResult | None  # of the MoE models; None without any, or if not asked for
    records: Mapping[str, dict[str, Any] | None]  # moefy.json by model; None: not made by moefy
    logs: Mapping[str, list[dict[str, Any]]]  # the steps of training, by model that was trained
    facts: Mapping[str, Any]  # what else results.json says: data, split, command, date, machine
    cards: Sequence[Path] = ()  # model folders whose cards show these results

    @property
    def dense(self) -> Result | None:
        """The model that the others are compared with."""
        results = self.comparison.results
        return next((r for r in results if r.name == self.comparison.reference), None)

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Model, benchmark and reason of every score that is missing."""
        return [] if self.suite is None else self.suite.failures

    @property
    def text(self) -> str:
        """How much text was read, and which."""
        kind = SPLIT_NAMES[self.facts["split"]]
        return f"{self.comparison.tokens:,} tokens of the {kind} documents of {self.facts['data']}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the steps of the training are in the charts' files."""
        parts = ("comparison", "suite", "routing")
        found = {part: getattr(self, part) for part in parts}
        measured = {part: result and result.to_dict() for part, result in found.items()}
        return {**self.facts, **measured, "models": dict(self.records)}


def facts_of(command: str, data: str, split: Side, *, suite: bool = False) -> dict[str, Any]:
    """Return what a report says of its measurement: what, when, where, with which versions."""
    place = device()
    packages = ["moefy", "torch", "transformers", *(["lm_eval"] if suite else [])]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "data": data,
        "split": split,
        "machine": {
            "platform": platform.platform(),
            "device": "cpu" if place.type == "cpu" else torch.cuda.get_device_name(place),
            # Speeds on a CPU mean nothing without this number.
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a model folder's moefy.json, None if there is none.

    Raises:
        CheckpointError: The file cannot be read.
    """
    file = folder / "moefy.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(record, dict) or "stage" not in record:
        raise CheckpointError(f"{file} does not say how the model was made: move it away")
    return record


def read_logs(folders: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the steps of the models that `train` made, by name."""
    return {name: read_log(folder) for name, folder in folders.items() if (folder / LOG).is_file()}
