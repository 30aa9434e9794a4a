"""What a study leaves: for each ablation CSV files and a figure, and `study.md` over all.

Tables and conclusions are made from the CSV files alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moefy.report.tables import Rows, markdown, millions, write_csv
from moefy.storage import replace_file, storage_errors
from moefy.studies.ablations import ABLATIONS, Ablation, ablations_named
from moefy.studies.conclude import conclusion
from moefy.studies.figures import ablation_figure, pareto_figure
from moefy.studies.grid import (
    GRID,
    SPEED,
    GridPoint,
    front,
    grid_csv_rows,
    grid_of,
    read_grid,
    split_named,
)
from moefy.studies.outcome import ArmOutcome, Spread, difference, read_outcome, spread
from moefy.studies.recipe import StudyRecipe
from moefy.studies.runs import Run, run_csv_rows, seeds_text

PAGE = "study.md"
HEAD = "about.md"
"""What was studied, and what could not be: the beginning of the page."""
NOT_RUN = "Not run:"
"""Before the list of what could not be."""
Curves = dict[str, dict[int, list[tuple[int, float]]]]
"""Tokens and loss, by arm and seed."""


def write_tables(
    out: Path, runs: Sequence[Run], recipe: StudyRecipe, facts: Mapping[str, str]
) -> dict[str, str]:
    """Write the CSV files and the figures.

    Args:
        out: the study's folder.
        runs: all that are shown.
        recipe: of the study.
        facts: model and data, by name.

    Returns:
        Splits that are not in the grid, and why.
    """
    unmeasured = {}
    for ablation in ABLATIONS:
        found = runs_of(ablation, runs, recipe)
        files = [out / f"{ablation.name}{end}" for end in (".csv", "-curves.csv", ".png")]
        if not found:
            for file in files:
                file.unlink(missing_ok=True)
            continue
        table, curves, picture = files
        with storage_errors(out):
            write_csv(table, run_csv_rows(found))
            if any(run.curve for run in found):
                write_csv(curves, curve_rows(found))
        if ablation.name == "size":
            unmeasured = _write_grid(out, facts)
        with storage_errors(out):
            ablation_figures(out, ablation).savefig(picture, dpi=150)
    return unmeasured


def write_page(
    out: Path,
    runs: Sequence[Run],
    recipe: StudyRecipe,
    facts: Mapping[str, str],
    skipped: Mapping[str, str],
) -> dict[str, str]:
    """Write `study.md` over the files of `write_tables`.

    Args:
        out: as there.
        runs: as there.
        recipe: as there.
        facts: as there.
        skipped: what is missing, and why.

    Returns:
        The conclusions, by ablation.
    """
    replace_file(out / HEAD, _head(runs, recipe, facts) + _skipped(skipped))
    replace_file(out / PAGE, page(out))
    return {name: conclusion_of(out, name) for name in present(out)}


def runs_of(ablation: Ablation, runs: Sequence[Run], recipe: StudyRecipe) -> list[Run]:
    """Return an ablation's runs in the order of its arms and seeds."""
    order = [arm.name for arm in ablation.arms(recipe)]
    found = [run for run in runs if run.ablation == ablation.name and run.arm in order]
    return sorted(found, key=lambda run: (order.index(run.arm), run.seed))


def present(folder: Path) -> list[str]:
    """Return the names of the ablations that a folder has results of."""
    return [a.name for a in ABLATIONS if (folder / f"{a.name}.csv").is_file()]


def page(folder: Path) -> str:
    """Return the whole page, from the files in a study's folder."""
    sections = [section(folder, name) for name in present(folder)]
    return "\n".join([(folder / HEAD).read_text(), *sections])


def section(folder: Path, name: str) -> str:
    """Return an ablation's section, from the CSV files in a folder."""
    (ablation,) = ablations_named([name])
    arms = read_outcome(folder / f"{name}.csv")
    names = [f"{name}.csv", f"{name}-curves.csv", *([GRID] if name == "size" else [])]
    data = [f"[{file}]({file})" for file in names if (folder / file).is_file()]
    parts = [f"## {ablation.title}", ablation.setup, markdown(outcome_rows(arms)).rstrip()]
    if name == "size" and (folder / GRID).is_file():
        parts.append(markdown(grid_rows(read_grid(folder / GRID))).rstrip())
    parts += [
        f"![{ablation.title}]({name}.png)",
        f"**Conclusion.** {conclusion_of(folder, name)}",
        f"Loss: {ablation.measure}. Every run: {', '.join(data)}.",
    ]
    return "\n\n".join(parts) + "\n"


def conclusion_of(folder: Path, name: str) -> str:
    """Return an ablation's conclusion, from the CSV files in a folder."""
    (ablation,) = ablations_named([name])
    text = conclusion(ablation, read_outcome(folder / f"{name}.csv"))
    if name == "size" and (folder / GRID).is_file():
        text += " " + _front_text(read_grid(folder / GRID))
    return text


def outcome_rows(arms: dict[str, ArmOutcome]) -> Rows:
    """Return header and rows of an ablation's table."""
    learned = any(arm.learned for arm in arms.values())
    domains = next(iter(arms.values())).domains
    shows_domains = len(domains) > 1
    header = ["arm", "seeds", "against"]
    header += ["loss before", "difference"] if learned else []
    header += ["loss", "difference"]
    if shows_domains:
        header += list(domains)
    rows = [[*header, "params", "active"]]
    for arm in arms.values():
        other = arms.get(arm.against) if arm.against else None
        cells = [arm.name, str(len(arm.after)), other.name if other else ""]
        for when in ("before", "after") if learned else ("after",):
            losses = getattr(arm, when)
            found = difference(losses, getattr(other, when)) if other else None
            cells += [spread(list(losses.values())).text(), found.text("+") if found else ""]
        if shows_domains:
            cells += [f"{arm.domains[domain]:.3f}" for domain in domains]
        cells += [millions(arm.total_params), millions(arm.active_params)]
        rows.append(cells)
    return rows


def grid_rows(points: list[GridPoint]) -> Rows:
    """Return header and rows of the grid: loss against active size and speed."""
    rows = [["split", "shared", "active", "nats above dense", "prefill", "decode", "front"]]
    best = front(points)
    for point in points:
        nats = Spread(point.nats_above_dense, point.half_width, point.seeds)
        rows.append(
            [
                point.split.name,
                str(point.shared),
                f"{point.active_of_dense:.0%}",
                nats.text(),
                f"{point.prefill_of_dense:.2f}",
                f"{point.decode_of_dense:.2f}",
                "yes" if point in best else "",
            ]
        )
    return rows


def curve_rows(runs: list[Run]) -> Rows:
    """Return header and rows of the losses along training."""
    rows = [["arm", "seed", "tokens", "loss"]]
    for run in runs:
        rows += [[run.arm, str(run.seed), str(tokens), str(loss)] for tokens, loss in run.curve]
    return rows


def read_curves(file: Path) -> Curves:
    """Read what `curve_rows` gave; nothing where there is no file."""
    curves: Curves = {}
    if file.is_file():
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                by_seed = curves.setdefault(row["arm"], {})
                point = int(row["tokens"]), float(row["loss"])
                by_seed.setdefault(int(row["seed"]), []).append(point)
    return curves


def ablation_figures(folder: Path, ablation: Ablation) -> Any:
    """Draw an ablation from the CSV files in a folder."""
    if ablation.name == "size" and (folder / GRID).is_file():
        return pareto_figure(read_grid(folder / GRID))
    arms = read_outcome(folder / f"{ablation.name}.csv")
    return ablation_figure(arms, read_curves(folder / f"{ablation.name}-curves.csv"))


def _write_grid(out: Path, facts: Mapping[str, str]) -> dict[str, str]:
    """Write the grid where speeds are known; return the splits of which none is."""
    arms = read_outcome(out / "size.csv")
    if (out / SPEED).is_file():
        found = json.loads((out / SPEED).read_text())
        about = {**facts, "machine": found["about"]["machine"]}
        points = grid_of(arms, found["tokens_per_s"], **about)
        with storage_errors(out):
            write_csv(out / GRID, grid_csv_rows(points))
    known = read_grid(out / GRID) if (out / GRID).is_file() else []
    missing = {name for name in arms if split_named(name)} - {point.split.name for point in known}
    return {f"size: speed of {name}": "not measured" for name in arms if name in missing}


def _front_text(points: list[GridPoint]) -> str:
    names = ", ".join(point.split.name for point in front(points))
    first = points[0]
    decoded = max(points, key=lambda point: point.decode_of_dense)
    return (
        f"No other split has both fewer active parameters and a lower mean loss than these: "
        f"{names}. Decoding is fastest with {decoded.split.name}, at "
        f"{decoded.decode_of_dense:.2f} times the dense model's speed ({first.machine})."
    )


def _head(runs: Sequence[Run], recipe: StudyRecipe, facts: Mapping[str, str]) -> str:
    machines = ", ".join(sorted({run.machine for run in runs}))
    return (
        "# Study\n\n"
        f"The ablations of LLaMA-MoE (arXiv 2406.16554) on {facts['model']}, text: "
        f"{facts['data']}, as `moefy study` ran them ({machines}). Losses are measured on "
        f"{recipe.windows} held-out windows of {recipe.sequence_length} tokens per domain, the "
        "same for every model, and are means over the domains.\n\n"
        f"Seeds: {seeds_text(runs)}. A seed decides partition, router, fresh weights and the order "
        "of samples, not the held-out text. ± is half of the 95 % interval of the mean over the "
        "seeds (Student's t); differences are taken seed by seed, and what is inside its ± is no "
        "difference. Every setting is in `recipe.yaml` beside the tables.\n"
    )


def _skipped(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return ""
    lines = "".join(f"- {what}: {why}\n" for what, why in skipped.items())
    return f"\n{NOT_RUN}\n\n{lines}"
