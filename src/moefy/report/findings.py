"""What a report is made of, and where and with what it was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefy.data.domains import Side
from moefy.errors import CheckpointError
from moefy.evaluation.compare import Comparison
from moefy.evaluation.routing import RoutingResult
from moefy.evaluation.suite import SuiteResult
from moefy.hardware import device
from moefy.training.state import LOG, read_log

SPLIT_NAMES: dict[Side, str] = {"heldout": "held-out", "train": "training", "all": "all"}
"""What a split's documents are called."""


@dataclass(frozen=True)
class ReportedModel:
    """What a model's folder says of how it was made.

    Attributes:
        name: as shown.
        record: its moefy.json; None if moefy did not make it.
        log: the steps of its training, empty if it was not trained.
    """

    name: str
    record: dict[str, Any] | None
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class Findings:
    """All that a report shows.

    Attributes:
        comparison: of all models.
        suite: of all models in the same order, if it was asked for.
        routing: of the MoE models, if there are any and it was asked for.
        models: in the same order.
        data: the corpus on which comparison and routing were measured.
        split: which of its documents.
        command: that makes the report.
        date: of the report, UTC.
        machine: where it was measured.
        versions: of what measured.
    """

    comparison: Comparison
    suite: SuiteResult | None
    routing: RoutingResult | None
    models: list[ReportedModel]
    data: str
    split: Side
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Model, benchmark and reason of every score that is missing."""
        return [] if self.suite is None else self.suite.failures

    @property
    def text(self) -> str:
        """How much text was read, and which."""
        kind = SPLIT_NAMES[self.split]
        return f"{self.comparison.tokens:,} tokens of the {kind} documents of {self.data}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the steps of the training are in the charts' files."""
        return {
            "date": self.date,
            "command": self.command,
            "data": self.data,
            "split": self.split,
            "machine": self.machine,
            "versions": self.versions,
            "comparison": self.comparison.to_dict(),
            "suite": None if self.suite is None else self.suite.to_dict(),
            "routing": None if self.routing is None else self.routing.to_dict(),
            "models": {model.name: model.record for model in self.models},
        }


def now() -> str:
    """Return the date and the minute in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> dict[str, Any]:
    """Return where this process computes."""
    place = device()
    return {
        "platform": platform.platform(),
        "device": place.type if place.type == "cpu" else torch.cuda.get_device_name(place),
        "threads": torch.get_num_threads(),
    }


def versions(*, suite: bool) -> dict[str, str]:
    """Return the versions of what measures.

    Args:
        suite: benchmarks are among it.
    """
    names = ["moefy", "torch", "transformers", *(["lm_eval"] if suite else [])]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def reported_models(folders: Sequence[Path], names: Sequence[str]) -> list[ReportedModel]:
    """Read how models were made.

    Raises:
        CheckpointError: a folder's moefy.json cannot be read.
    """
    models = []
    for folder, name in zip(folders, names, strict=True):
        record = read_record(folder)
        trained = record is not None and record.get("stage") == "train"
        log = read_log(folder) if trained and (folder / LOG).is_file() else []
        models.append(ReportedModel(name, record, log))
    return models


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a model folder's moefy.json, None if there is none.

    Raises:
        CheckpointError: it cannot be read.
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
