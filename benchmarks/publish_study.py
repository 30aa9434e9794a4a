"""Put studies into docs/study.md and docs/study/.

    moefy study OUT ...                          # as in CONTRIBUTING.md
    python benchmarks/publish_study.py OUT...    # of each number of tokens one; others stay
    python benchmarks/publish_study.py           # the pages of those that are there

The page is made from the files in docs/study/ alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moefy.report.tables import Rows, markdown
from moefy.run_folder import MARKER
from moefy.studies.ablations import ABLATIONS, Ablation
from moefy.studies.points import GRID, read_grid
from moefy.studies.recipe import StudyRecipe
from moefy.studies.report import (
    HEAD,
    PAGE,
    UNDECIDED,
    Arms,
    agreement,
    arms_in,
    difference,
    grid_says,
    page,
)
from moefy.studies.runs import RUNS, read_runs

ROOT = Path(__file__).resolve().parents[1]
KINDS = (GRID, "*.png", HEAD, "recipe.yaml", RUNS, MARKER)  # with the marker a copy goes on
NOT_RUN = "Not run:"  # in about.md.j2
Studies = dict[Path, StudyRecipe]
"""Their folders, the fewest tokens first."""


def publish(outs: Sequence[Path], docs: Path) -> None:
    for out in outs:
        place = docs / "study" / f"{StudyRecipe.build(out / 'recipe.yaml').tokens}-tokens"
        place.mkdir(parents=True, exist_ok=True)
        files = {file.name: file.read_bytes() for kind in KINDS for file in out.glob(kind)}
        for file in [file for kind in KINDS for file in place.glob(kind)]:
            file.unlink()  # what this study does not have is of an older one
        for name, content in files.items():
            (place / name).write_bytes(content)
    studies = studies_in(docs / "study")
    for folder in studies:
        (folder / PAGE).write_text(page(folder))
    (docs / "study.md").write_text(overview(studies, docs))


def studies_in(folder: Path) -> Studies:
    found = {file.parent: StudyRecipe.build(file) for file in folder.glob("*/recipe.yaml")}
    return dict(sorted(found.items(), key=lambda item: item[1].tokens))


def overview(studies: Studies, docs: Path) -> str:
    """Return docs/study.md: each comparison in all of the studies."""
    head = (
        "# Ablations on SmolLM2-135M\n\n"
        "What `moefy study` found, beside what LLaMA-MoE (arXiv 2406.16554) found. The studies "
        "below differ in tokens and seeds: several seeds say which differences are more than "
        "chance, more tokens which way they go. A difference is of held-out loss in nats per token "
        "(below 0: the arm is better than the other), with half of the 95% interval over the "
        "seeds; without ± it is of one seed. A result is “not decided” where the interval includes "
        "0 or there is one seed. “The paper” is how its result says the loss differs, and whether "
        "the study agrees.\n\n"
        "Generated from docs/study/ by `benchmarks/publish_study.py`; the commands are in "
        "CONTRIBUTING.md.\n"
    )
    parts = [head, markdown(study_rows(studies, docs))]
    for folder, recipe in studies.items():
        _, marker, missing = (folder / HEAD).read_text().partition(NOT_RUN)
        if marker:
            parts.append(f"Not run with {_name(recipe)}:\n\n{missing.strip()}\n")
    everything = {folder: arms_in(folder) for folder in studies}
    for ablation in ABLATIONS:
        found = {
            folder: arms[ablation.name]
            for folder, arms in everything.items()
            if ablation.name in arms
        }
        if found:
            names = {_name(studies[folder]): folder for folder in found}
            parts.append(_section(ablation, names, found, docs))
    return "\n".join(parts)


def study_rows(studies: Studies, docs: Path) -> Rows:
    rows = [["study", "seeds", "held out per domain", "machines", "every loss"]]
    for folder, recipe in studies.items():
        runs = read_runs(folder / RUNS).values()
        rows.append(
            [
                _name(recipe),
                ", ".join(sorted({str(run.seed) for run in runs})),
                f"{recipe.windows} × {recipe.sequence_length} tokens",
                ", ".join(sorted({run.machine for run in runs})),
                f"[{folder.name}/{PAGE}]({(folder / PAGE).relative_to(docs)})",
            ]
        )
    return rows


def _section(
    ablation: Ablation, folders: dict[str, Path], arms: dict[Path, Arms], docs: Path
) -> str:
    found = {study: arms[folder] for study, folder in folders.items()}
    parts = [f"## {ablation.title}", ablation.setup, markdown(comparison_rows(found)).rstrip()]
    for study, folder in folders.items():
        figure = (folder / f"{ablation.name}.png").relative_to(docs)
        parts.append(f"![{ablation.title}, {study}]({figure})")
        if ablation.name == "size" and (folder / GRID).is_file():
            parts.append(grid_says(read_grid(folder / GRID)))
    if ablation.paper:
        parts.append(f"The paper: {ablation.paper}")
    return "\n\n".join(parts) + "\n"


def comparison_rows(found: dict[str, Arms]) -> Rows:
    """Return header and rows: how each arm differs from its other, in the studies by name."""
    pairs = {
        (name, runs[0].against): runs[0].expected
        for arms in found.values()
        for name, runs in arms.items()
        if runs[0].against in arms
    }
    rows = [["arm", "compared with", "the paper"]]
    losses: dict[str, list[str]] = {}
    for study, arms in found.items():
        learned = any(run.trained for runs in arms.values() for run in runs)
        ends = [f"start, {study}", f"end, {study}"] if learned else [f"untrained, study of {study}"]
        losses[study] = ["loss_before", "loss"] if learned else ["loss"]
        rows[0] += [*ends, "result"]
    for (name, other), expected in pairs.items():
        row = [name, other, expected or ""]
        for study, arms in found.items():
            for when in losses[study]:
                ends = difference(arms.get(name, []), arms.get(other, []), when)
                row.append(ends.text("+") if ends else "")
            mark = ends.mark if ends else ""
            agrees = agreement(expected, mark) if mark not in ("", UNDECIDED) else ""
            row.append(f"{mark} ({agrees})" if agrees else mark)
        rows.append(row)
    return rows


def _name(recipe: StudyRecipe) -> str:
    return f"{recipe.tokens:,} tokens"


if __name__ == "__main__":
    publish(list(map(Path, sys.argv[1:])), ROOT / "docs")
