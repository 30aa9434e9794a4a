"""The results of benchmarks/distillation.py as CSV, table and figure."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from publish import replace_table

from moefy.report.tables import Rows

DOCS = Path(__file__).parents[1] / "docs"
BASELINE = "cross-entropy"
DENSE = "dense"
CONVERTED = "converted"
FRUGAL = "converted from a tenth of the tokens"
RANDOM = "random split"
RESCALED = "random split, rescaled"
_NUM_DRAWN = 3
MEASURED = ("tokens", "heldout", "kl_to_dense", "seconds", "by_window")


@dataclass(frozen=True)
class Run:
    """One training: method, highest learning rate, share of the tokens, seed of their order."""

    method: str
    rate: float
    share: float
    seed: int

    def file(self, folder: Path) -> Path:
        """Where the run's curve lies; it exists when the run is complete."""
        name = f"{self.method}-lr{self.rate:g}-x{self.share:g}-s{self.seed}.jsonl"
        return folder / name.replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Point:
    """A measurement of a run."""

    tokens: int
    heldout: float
    kl_to_dense: float
    by_window: Float[np.ndarray, " windows"]


Curves = dict[Run, list[Point]]


def publish(folder: Path, model: str) -> None:
    """Write CSV, figure and the table in docs/objective.md of all complete runs in a folder."""
    name = DOCS / "training" / f"distillation-{model}"
    name.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()
    ]
    columns = [*(field.name for field in fields(Run)), *MEASURED]
    lines.sort(key=lambda line: [line[key] for key in columns])
    with name.with_suffix(".csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        for line in lines:
            row = {**line, "by_window": " ".join(f"{loss:.4f}" for loss in line["by_window"])}
            for key in ("heldout", "kl_to_dense"):
                row[key] = f"{line[key]:.4f}"
            row["seconds"] = f"{line['seconds']:.0f}"
            table.writerow(row[key] for key in columns)
    curves = _read(name.with_suffix(".csv"))
    replace_table(DOCS / "objective.md", name.name, result_rows(curves))
    _figure(curves).savefig(name.with_suffix(".png"), dpi=150)


def result_rows(curves: Curves) -> Rows:
    """Return what every method ends at with its best rate, against cross-entropy on all tokens.

    Where there are several seeds, their mean, and the difference between equal seeds. Its standard
    error is over held-out windows, paired.
    """
    best = _best(curves)
    baseline = _ends(curves, BASELINE, 1.0, best[BASELINE, 1.0]) if (BASELINE, 1.0) in best else {}
    dense = curves[Run(DENSE, 0.0, 0.0, 0)][-1].heldout
    header = ["objective", "tokens", "learning rate", "seeds", "nats above dense"]
    rows = [[*header, f"above {BASELINE}'s end", "KL to dense"]]
    for (method, share), rate in best.items():
        ends = _ends(curves, method, share, rate)
        paired = sorted(ends.keys() & baseline.keys()) if share else []
        differences = [ends[seed].by_window - baseline[seed].by_window for seed in paired]
        rows.append(
            [
                method,
                f"{next(iter(ends.values())).tokens:,}",
                f"{rate:g}" if share else "",
                str(len(ends)) if share else "",
                f"{np.mean([end.heldout for end in ends.values()]) - dense:.3f}",
                _with_error(np.mean(differences, axis=0)) if differences else "",
                f"{np.mean([end.kl_to_dense for end in ends.values()]):.3f}",
            ]
        )
    return rows


def _with_error(by_window: Float[np.ndarray, " windows"]) -> str:
    error = by_window.std(ddof=1) / np.sqrt(len(by_window))
    return f"{by_window.mean():+.3f} ± {error:.3f}"


def _read(file: Path) -> Curves:
    curves: Curves = defaultdict(list)
    with file.open() as lines:
        for row in csv.DictReader(lines):
            run = Run(row["method"], float(row["rate"]), float(row["share"]), int(row["seed"]))
            by_window = np.array(row["by_window"].split(), dtype=float)
            numbers = float(row["heldout"]), float(row["kl_to_dense"])
            curves[run].append(Point(int(row["tokens"]), *numbers, by_window))
    return curves


def _ends(curves: Curves, method: str, share: float, rate: float) -> dict[int, Point]:
    """Return the last measurement of each seed."""
    return {
        run.seed: curve[-1]
        for run, curve in curves.items()
        if (run.method, run.share, run.rate) == (method, share, rate)
    }


def _best(curves: Curves) -> dict[tuple[str, float], float]:
    """Return the best rate, by the first seed, of each method and share, in the table's order."""
    first_seed = min(run.seed for run in curves)
    found: dict[tuple[str, float], tuple[float, float]] = {}
    for run, curve in curves.items():
        if run.seed == first_seed:
            end = (curve[-1].heldout, run.rate)
            found[run.method, run.share] = min(found.get((run.method, run.share), end), end)
    # untrained models first, then the largest share; within a share the best method first
    order = sorted(found, key=lambda key: (key[1] > 0, -key[1], found[key]))
    return {key: found[key][1] for key in order}


def _figure(curves: Curves) -> Figure:
    """Draw what runs of so many tokens end at: cross-entropy, the best others, the paper's line."""
    best = _best(curves)
    dense = curves[Run(DENSE, 0.0, 0.0, 0)][-1].heldout
    start = curves[Run(CONVERTED, 0.0, 0.0, 0)][-1:]
    methods = list(dict.fromkeys(method for method, share in best if share))
    others = [m for m in methods if m != BASELINE and not m.startswith(RANDOM)]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in [BASELINE, *others[:_NUM_DRAWN]]:
        ends = list(start)
        for share in sorted(share for name, share in best if name == method):
            ends.append(next(iter(_ends(curves, method, share, best[method, share]).values())))
        axes.plot(
            [end.tokens / 1e3 for end in ends],
            [end.heldout - dense for end in ends],
            marker="o",
            label=method,
        )
        if method == BASELINE:
            axes.axhline(ends[-1].heldout - dense, color="C0", linestyle="--", linewidth=1)
    for method in methods:
        if method.startswith(RANDOM):
            [end, *_] = _ends(curves, method, 1.0, best[method, 1.0]).values()
            axes.axhline(end.heldout - dense, color="0.4", linestyle=":", label=f"{method}, end")
    axes.set(xlabel="tokens of the run (thousands)", ylabel="held-out nats above dense")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
