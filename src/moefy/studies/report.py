"""What a study leaves: a CSV file and a figure for each ablation, and `study.md` over all.

The page is made from the files in the folder alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moefy.report.tables import Rows, markdown, write_csv
from moefy.storage import replace_file, storage_errors
from moefy.studies.ablations import ABLATIONS, Ablation, ablations_named
from moefy.studies.figures import ablation_figure, grid_figure
from moefy.studies.grid import GRID, grid_rows, read_grid, write_grid
from moefy.studies.recipe import StudyRecipe
from moefy.studies.runs import Run, read_arms, run_rows
from moefy.studies.summary import summary_rows

PAGE = "study.md"
HEAD = "about.md"
"""The beginning of the page: what was studied, and what could not be."""
NOT_RUN = "Not run:"


def write_report(
    out: Path,
    runs: Sequence[Run],
    recipe: StudyRecipe,
    skipped: Mapping[str, str],
    *,
    model: str,
    data: str,
) -> dict[str, Rows]:
    """Write tables, figures and the page of all runs; return the tables by ablation.

    `skipped` says what is missing and why, `model` and `data` are names.
    """
    for ablation in ABLATIONS:
        table, picture = (out / f"{ablation.name}{end}" for end in (".csv", ".png"))
        found = runs_of(ablation, runs, recipe)
        if not found:
            continue
        with storage_errors(out):
            write_csv(table, run_rows(found))
        # What is drawn and written comes from the file, so that it can be made again from it.
        arms = read_arms(table)
        figure = ablation_figure(arms)
        if ablation.name == "size":
            write_grid(out, arms, model=model, data=data)
            if (out / GRID).is_file():
                figure = grid_figure(read_grid(out / GRID))
        with storage_errors(out):
            figure.savefig(picture, dpi=150)
    machines = ", ".join(sorted({run.machine for run in runs}))
    head = (
        f"# Study\n\nAblations on {model}, text: {data}, as `moefy study` ran them ({machines}). "
        f"Losses are measured on {recipe.windows} held-out windows of {recipe.sequence_length} "
        "tokens per domain, the same for every model, and are means over the domains.\n\n"
        "A seed decides partition, router, fresh weights and the order "
        "of samples, not the held-out text. ± is half of the 95% interval of the mean over the "
        "seeds (Student's t). Differences are paired by seed; a result is not decided where the "
        "interval includes 0 or is of one seed. Every setting is in `recipe.yaml`.\n"
    )
    if skipped:
        lines = "".join(f"- {what}: {why}\n" for what, why in skipped.items())
        head += f"\n{NOT_RUN}\n\n{lines}"
    replace_file(out / HEAD, head)
    replace_file(out / PAGE, page(out))
    return {name: summary_rows(read_arms(out / f"{name}.csv")) for name in present(out)}


def runs_of(ablation: Ablation, runs: Iterable[Run], recipe: StudyRecipe) -> list[Run]:
    """Return an ablation's runs in the order of its arms and seeds."""
    order = [arm.name for arm in ablation.arms(recipe)]
    found = [run for run in runs if run.ablation == ablation.name and run.arm in order]
    return sorted(found, key=lambda run: (order.index(run.arm), run.seed))


def present(folder: Path) -> list[str]:
    """Return the names of the ablations that a folder has results of."""
    return [a.name for a in ABLATIONS if (folder / f"{a.name}.csv").is_file()]


def page(folder: Path) -> str:
    """Return the whole page, from the files in a study's folder."""
    sections = [_section(folder, name) for name in present(folder)]
    return "\n".join([(folder / HEAD).read_text(), *sections])


def _section(folder: Path, name: str) -> str:
    (ablation,) = ablations_named([name])
    table = summary_rows(read_arms(folder / f"{name}.csv"))
    parts = [f"## {ablation.title}", ablation.setup, markdown(table).rstrip()]
    files = [f"[{name}.csv]({name}.csv)"]
    if name == "size" and (folder / GRID).is_file():
        parts.append(markdown(grid_rows(read_grid(folder / GRID))).rstrip())
        files.append(f"[{GRID}]({GRID})")
    parts.append(f"![{ablation.title}]({name}.png)")
    if ablation.paper:
        parts.append(f"The paper: {ablation.paper}")
    parts.append(f"Loss: {ablation.measure}. Every run: {', '.join(files)}.")
    return "\n\n".join(parts) + "\n"
