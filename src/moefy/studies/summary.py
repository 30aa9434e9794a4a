"""What runs say about arms: means over seeds, and differences that are more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moefy.report.tables import Rows, millions
from moefy.studies.runs import Run

# Student's t, 97.5th percentile, for 1 to 9 degrees of freedom; the last is used beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_SMALLEST = 0.0005  # tables show three decimals, so a smaller difference is not visible
UNDECIDED = "not decided"


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    half_width: float | None  # of the 95% interval of the mean; None for a single value

    @property
    def mark(self) -> str:
        """Whether it is higher or lower than 0, where the interval and three decimals show it."""
        # One value has no spread, so it cannot be called more than chance.
        if self.half_width is None or abs(self.mean) <= max(self.half_width, _SMALLEST):
            return UNDECIDED
        return "higher" if self.mean > 0 else "lower"

    def text(self, sign: str = "") -> str:
        """Return it as in 3.141 ± 0.002, with a plus before positive means where `sign` is "+"."""
        mean = round(self.mean, 3) or 0.0  # no -0.000
        shown = f"{mean:{sign}.3f}"
        return shown if self.half_width is None else f"{shown} ± {self.half_width:.3f}"


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and its 95% interval t·s/√n, t Student's for n − 1 degrees of freedom.

    Values that are all the same do not depend on the seed: they count as one.
    """
    if len(set(values)) < 2:
        return Spread(values[0], None)
    # Few seeds have a wide interval: with three, t is 4.3 instead of the normal 1.96.
    t = _T[min(len(values) - 1, len(_T)) - 1]
    half_width = t * statistics.stdev(values) / math.sqrt(len(values))
    return Spread(statistics.fmean(values), half_width)


def difference(ours: Sequence[Run], theirs: Sequence[Run], loss: str = "loss") -> Spread | None:
    """Return how much higher the loss of our runs is; None where they have no seed in common.

    Differences are paired by seed, since runs of one seed share the order of samples.
    """
    other = {run.seed: getattr(run, loss) for run in theirs}
    found = [getattr(run, loss) - other[run.seed] for run in ours if run.seed in other]
    return spread(found) if found else None


def agreement(expected: str | None, mark: str) -> str:
    """Say whether a mark agrees with the paper.

    A spread cannot show that two arms are the same, only that they are not.
    """
    if expected is None or mark == UNDECIDED:
        return UNDECIDED if expected else ""
    return "agrees" if mark == expected else "contradicts"


def summary_rows(arms: Mapping[str, Sequence[Run]]) -> Rows:
    """Return header and rows of an ablation's table, an arm a row."""
    learned = any(run.trained or run.conversations for runs in arms.values() for run in runs)
    losses = ["loss_before", "loss"] if learned else ["loss"]
    header = ["arm", "seeds", "compared with"]
    header += ["loss before", "difference"] if learned else []
    header += ["loss", "difference", "result", "the paper", "agreement", "params", "active"]
    rows = [header]
    for name, runs in arms.items():
        first = runs[0]
        other = arms.get(first.against or "")
        cells = [name, str(len(runs)), (first.against or "") if other else ""]
        found = None
        for loss in losses:
            found = difference(runs, other, loss) if other else None
            cells.append(spread([getattr(run, loss) for run in runs]).text())
            cells.append(found.text("+") if found else "")
        mark = found.mark if found else UNDECIDED * (other is not None)
        cells += [mark, first.expected or "", agreement(first.expected, mark)]
        rows.append([*cells, millions(first.total_params), millions(first.active_params)])
    return rows
