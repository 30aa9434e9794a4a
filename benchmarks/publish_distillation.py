"""The results of benchmarks/distillation.py as CSV, table and figure."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure

from moefy.report.tables import Rows, replace_table

DOCS = Path(__file__).parents[1] / "docs"
BASELINE = "cross-entropy"
Point = dict[str, float]


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


def publish(folder: Path, model: str, dense: float, converted: float) -> None:
    """Write CSV, figure and the table in docs/objective.md of all complete runs in a folder."""
    name = DOCS / "training" / f"distillation-{model}"
    name.parent.mkdir(parents=True, exist_ok=True)
    points = [
        json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()
    ]
    keys = [field.name for field in fields(Run)]
    points.sort(key=lambda point: [point[key] for key in [*keys, "tokens"]])
    with name.with_suffix(".csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        measured = ["heldout", "kl_to_dense", "seconds"]
        table.writerow([*keys, "tokens", *measured, "dense", "converted"])
        for point in points:
            numbers = [*(point[key] for key in measured), dense, converted]
            values = [f"{value:.4f}" for value in numbers]
            table.writerow([*(point[key] for key in [*keys, "tokens"]), *values])
    replace_table(
        DOCS / "objective.md", f"distillation-{model}", nats_rows(name.with_suffix(".csv"))
    )
    _figure(name.with_suffix(".csv")).savefig(name.with_suffix(".png"), dpi=150)


def nats_rows(file: Path) -> Rows:
    """Return held-out nats above dense, a row per method at its best rate, a column per share."""
    curves, dense, converted = _read(file)
    shares = sorted({run.share for run in curves}, reverse=True)
    tokens = max(point["tokens"] for curve in curves.values() for point in curve)
    header = ["nats above dense", "learning rate"]
    header += [f"{share * tokens:,.0f} tokens" for share in shares]
    rows = []
    for method, rate in _best(curves).items():
        cells = [method, f"{rate:g}"]
        for share in shares:
            ends = [
                curve[-1]["heldout"] - dense
                for run, curve in curves.items()
                if (run.method, run.rate, run.share) == (method, rate, share)
            ]
            spread = f" ± {statistics.stdev(ends):.3f}" if len(ends) > 1 else ""
            cells.append(f"{statistics.mean(ends):.3f}{spread}" if ends else "")
        rows.append(cells)
    untrained = ["converted, not trained", "", f"{converted - dense:.3f}"]
    return [header, [*untrained, *[""] * (len(shares) - 1)], *rows]


def _read(file: Path) -> tuple[dict[Run, list[Point]], float, float]:
    """Return the curves, the dense loss and the converted model's."""
    curves: dict[Run, list[Point]] = defaultdict(list)
    with file.open() as lines:
        for row in csv.DictReader(lines):
            run = Run(row["method"], float(row["rate"]), float(row["share"]), int(row["seed"]))
            curves[run].append({key: float(row[key]) for key in ("tokens", "heldout")})
    return curves, float(row["dense"]), float(row["converted"])


def _best(curves: dict[Run, list[Point]]) -> dict[str, float]:
    """Return each method's best rate, by the first seed on all tokens; cross-entropy first."""
    best: dict[str, tuple[float, float]] = {}
    for run, curve in curves.items():
        if run.share == 1 and run.seed == min(other.seed for other in curves):
            found = (curve[-1]["heldout"], run.rate)
            best[run.method] = min(best.get(run.method, found), found)
    order = sorted(best, key=lambda method: (method != BASELINE, best[method]))
    return {method: best[method][1] for method in order}


def _figure(file: Path) -> Figure:
    """Draw the curves of each method's best rate: bold on all tokens, thin on a share of them."""
    curves, dense, _ = _read(file)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    first_seed = min(run.seed for run in curves)
    for place, (method, rate) in enumerate(_best(curves).items()):
        for run, curve in curves.items():
            if (run.method, run.rate, run.seed) != (method, rate, first_seed):
                continue
            whole = run.share == 1
            axes.plot(
                [point["tokens"] / 1e3 for point in curve],
                [point["heldout"] - dense for point in curve],
                color=f"C{place}",
                linewidth=1.8 if whole else 0.8,
                marker="" if whole else "o",
                markevery=[len(curve) - 1],
                label=f"{method} (rate {rate:g})" if whole else None,
            )
            if whole and method == BASELINE:
                end = curve[-1]["heldout"] - dense
                axes.axhline(end, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="training tokens (thousands)", ylabel="held-out nats above dense", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
