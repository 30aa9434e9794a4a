"""What an ablation's CSV file says: arms over seeds, and differences with their spread."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5th percentile, for 1 to 9 degrees of freedom; beyond, the last is used."""

_SMALLEST = 0.0005


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half_width: of its 95 % interval (Student's t over the seeds); None for a single value.
        count: seeds; 1 where nothing depends on them.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves 0 out and 3 decimals show it, else 0."""
        if self.half_width is None or abs(self.mean) <= max(self.half_width, _SMALLEST):
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, sign: str = "") -> str:
        """Return it as a table shows it, as in 3.141 ± 0.002.

        Args:
            sign: "+" to show that of a positive mean.
        """
        mean = round(self.mean, 3) or 0.0  # no -0.000
        shown = f"{mean:{sign}.3f}"
        return shown if self.half_width is None else f"{shown} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class ArmOutcome:
    """One arm.

    Attributes:
        name: of the arm.
        against, expected: see `ablations.Arm`.
        before, after: losses by seed.
        domains: mean loss in the end over the seeds, by domain.
        trained, conversations, total_params, active_params, flops_per_token: see `runs.Run`.
    """

    name: str
    against: str | None
    expected: str | None
    before: dict[int, float]
    after: dict[int, float]
    domains: dict[str, float]
    trained: int
    conversations: int
    total_params: int
    active_params: int
    flops_per_token: int

    @property
    def learned(self) -> bool:
        """Whether it was trained or tuned."""
        return bool(self.trained or self.conversations)


def read_outcome(file: Path) -> dict[str, ArmOutcome]:
    """Read an ablation's CSV file (see `runs.run_csv_rows`), by arm, in its order."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    arms: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return {name: _arm(name, found) for name, found in arms.items()}


def _arm(name: str, rows: list[dict[str, str]]) -> ArmOutcome:
    domains = [key for key in rows[0] if key.startswith("loss_") and key != "loss_before"]
    first = rows[0]
    return ArmOutcome(
        name,
        first["against"] or None,
        first["expected"] or None,
        {int(row["seed"]): float(row["loss_before"]) for row in rows},
        {int(row["seed"]): float(row["loss"]) for row in rows},
        {
            key.removeprefix("loss_"): statistics.fmean(float(row[key]) for row in rows)
            for key in domains
            if first[key]
        },
        int(first["trained"]),
        int(first["conversations"]),
        int(first["total_params"]),
        int(first["active_params"]),
        int(first["flops_per_token"]),
    )


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and its interval.

    The half width is t·s/√n, t Student's for n − 1 degrees of freedom, s with n − 1. Values that
    are all the same do not depend on the seed: they count as one.
    """
    count = len(values)
    if len(set(values)) < 2:
        return Spread(values[0], None, 1)
    t = _T[min(count - 1, len(_T)) - 1]
    return Spread(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(count), count)


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Spread | None:
    """Return how much higher our loss is than theirs, over the seeds that both have.

    The differences are taken seed by seed, since runs of one seed share the order of samples. None
    where they have no seed in common.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return spread([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
