"""What a study leaves: a figure for each ablation, and `study.md` with a table for each.

The page is made from the files in the folder alone. ± is half of a 95% interval over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from moefy.checkpoint.card import rendered
from moefy.report.frontier import at_equal, frontier_figure
from moefy.report.tables import Rows, markdown, millions
from moefy.storage import replace_file, storage_errors
from moefy.studies.ablations import ABLATIONS, ablations_named
from moefy.studies.points import GRID, GridPoint, designs_of, grid_rows, read_grid
from moefy.studies.recipe import StudyRecipe
from moefy.studies.runs import RUNS, Run, read_runs

PAGE = "study.md"
HEAD = "about.md"
"""The beginning of the page: what was studied, and what could not be."""
Arms = dict[str, list[Run]]
UNDECIDED = "not decided"
# Student's t, 97.5th percentile, for 1 to 9 degrees of freedom; the last is used beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_SMALLEST = 0.0005  # tables show three decimals, so a smaller difference is not visible


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
    """Say whether a mark agrees with the paper; no spread can show that two arms are the same."""
    if expected is None or mark == UNDECIDED:
        return UNDECIDED if expected else ""
    return "agrees" if mark == expected else "contradicts"


def summary_rows(arms: Arms) -> Rows:
    """Return header and rows of an ablation's table, an arm a row."""
    learned = any(run.trained for runs in arms.values() for run in runs)
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


def ablation_figure(arms: Arms) -> Figure:
    """Draw each arm's held-out loss before and after training, with its interval over the seeds."""
    figure = Figure(figsize=(7.6, max(2.5, 0.3 * len(arms))), layout="constrained")
    axes = figure.subplots()
    for label, loss, color in (("before", "loss_before", "0.6"), ("after", "loss", "C0")):
        found = [spread([getattr(run, loss) for run in runs]) for runs in arms.values()]
        means, widths = [each.mean for each in found], [each.half_width or 0.0 for each in found]
        axes.errorbar(means, range(len(arms)), xerr=widths, fmt="o", color=color, label=label)
    axes.set_yticks(range(len(arms)), labels=list(arms))
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def grid_figure(points: list[GridPoint]) -> Figure:
    """Draw the losses of a study's splits over their measured speeds and sizes."""
    title = f"{points[0].model}, before training; speed in transformers on {points[0].machine}"
    return frontier_figure(designs_of(points), title)


def grid_says(points: list[GridPoint]) -> str:
    """Say where the splits of a study's grid beat pruning, and where pruning is better."""
    designs = designs_of(points)
    return " ".join(at_equal(designs, measure) for measure in designs[0].gains)


def write_report(
    out: Path,
    recipe: StudyRecipe,
    skipped: Mapping[str, str],
    *,
    model: str,
    data: str,
) -> dict[str, Rows]:
    """Write figures and the page of the runs in a folder; return the tables by ablation.

    `skipped` says what is missing and why, `model` and `data` are names.
    """
    found = arms_in(out)
    runs = read_runs(out / RUNS).values()
    machines = ", ".join(sorted({run.machine for run in runs}))
    for name, arms in found.items():
        with storage_errors(out):
            has_grid = name == "size" and (out / GRID).is_file()
            figure = grid_figure(read_grid(out / GRID)) if has_grid else ablation_figure(arms)
            figure.savefig(out / f"{name}.png", dpi=150)
    about = {"model": model, "data": data, "machines": machines, "recipe": recipe}
    head = rendered("moefy.studies", "about.md.j2", **about, skipped=skipped)
    replace_file(out / HEAD, head)
    replace_file(out / PAGE, page(out))
    return {name: summary_rows(arms) for name, arms in found.items()}


def arms_in(folder: Path) -> dict[str, Arms]:
    """Return the runs in a study's folder by ablation, arm and seed, each in its order."""
    recipe = StudyRecipe.build(folder / "recipe.yaml")
    runs = sorted(read_runs(folder / RUNS).values(), key=lambda run: run.seed)
    found: dict[str, Arms] = {}
    for ablation in ABLATIONS:
        for arm in ablation.arms(recipe):
            own = [run for run in runs if (run.ablation, run.arm) == (ablation.name, arm.name)]
            if own:
                found.setdefault(ablation.name, {})[arm.name] = own
    return found


def page(folder: Path) -> str:
    """Return the whole page, from the files in a study's folder."""
    sections = [_section(folder, name, arms) for name, arms in arms_in(folder).items()]
    return "\n".join([(folder / HEAD).read_text(), *sections])


def _section(folder: Path, name: str, arms: Arms) -> str:
    (ablation,) = ablations_named([name])
    parts = [f"## {ablation.title}", ablation.setup, markdown(summary_rows(arms)).rstrip()]
    if name == "size" and (folder / GRID).is_file():
        points = read_grid(folder / GRID)
        parts += [markdown(grid_rows(points)).rstrip(), grid_says(points)]
        parts.append(f"The grid is in [{GRID}]({GRID}).")
    parts.append(f"![{ablation.title}]({name}.png)")
    if ablation.paper:
        parts.append(f"The paper: {ablation.paper}")
    return "\n\n".join(parts) + "\n"
