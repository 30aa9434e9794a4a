"""Put studies into docs/study.md and docs/study/, and the measured grid into the package.

    moefy study OUT ...                          # as in CONTRIBUTING.md
    python benchmarks/publish_study.py OUT...    # of each number of tokens one; others stay
    python benchmarks/publish_study.py           # the pages of those that are there

The page is made from the files in docs/study/ alone; `moefy plan` reads the grid.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moefy.report.tables import Rows, markdown
from moefy.studies.ablations import ABLATIONS, Ablation
from moefy.studies.grid import GRID
from moefy.studies.outcome import ArmOutcome, difference, read_outcome
from moefy.studies.recipe import StudyRecipe
from moefy.studies.report import HEAD, NOT_RUN, PAGE, conclusion_of, page
from moefy.studies.runs import read_runs, seeds_text

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("*.csv", "*.png", "about.md", "recipe.yaml", "runs.jsonl")
Studies = dict[Path, StudyRecipe]
"""Their folders, the fewest tokens first."""


def publish(outs: Sequence[Path], docs: Path, package: Path) -> None:
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
    shutil.copyfile(grid_of(studies), package / GRID)


def studies_in(folder: Path) -> Studies:
    found = {file.parent: StudyRecipe.build(file) for file in folder.glob("*/recipe.yaml")}
    return dict(sorted(found.items(), key=lambda item: item[1].tokens))


def grid_of(studies: Studies) -> Path:
    """Return the grid that `plan` reads: of the study with the most tokens that has one."""
    return [folder / GRID for folder in studies if (folder / GRID).is_file()][-1]


def overview(studies: Studies, docs: Path) -> str:
    """Return docs/study.md: each comparison in all of the studies, and what each concludes."""
    head = (
        "# The paper's ablations on SmolLM2-135M\n\n"
        "What `moefy study` found, beside what LLaMA-MoE (arXiv 2406.16554) found. The studies "
        "below differ in tokens and seeds: several seeds say which differences are more than "
        "chance, more tokens which way they go. A difference is of held-out loss in nats per token "
        "(below 0: the arm is better than the other), with half of the 95 % interval over the "
        "seeds; without ± it is of one seed. “The paper” is what its result would make of the "
        "sign.\n\n"
        "Generated from docs/study/ by `benchmarks/publish_study.py`; the commands are in "
        "CONTRIBUTING.md.\n"
    )
    parts = [head, markdown(study_rows(studies, docs))]
    for folder, recipe in studies.items():
        _, marker, missing = (folder / HEAD).read_text().partition(NOT_RUN)
        if marker:
            parts.append(f"Not run with {_name(recipe)}:\n\n{missing.strip()}\n")
    for ablation in ABLATIONS:
        found = {
            _name(recipe): folder
            for folder, recipe in studies.items()
            if (folder / f"{ablation.name}.csv").is_file()
        }
        if found:
            parts.append(_section(ablation, found, docs))
    return "\n".join(parts)


def study_rows(studies: Studies, docs: Path) -> Rows:
    rows = [["study", "seeds", "held out per domain", "machines", "every loss"]]
    for folder, recipe in studies.items():
        runs = read_runs(folder).values()
        rows.append(
            [
                _name(recipe),
                seeds_text(runs),
                f"{recipe.windows} × {recipe.sequence_length} tokens",
                ", ".join(sorted({run.machine for run in runs})),
                f"[{folder.name}/{PAGE}]({(folder / PAGE).relative_to(docs)})",
            ]
        )
    return rows


def _section(ablation: Ablation, folders: dict[str, Path], docs: Path) -> str:
    outcomes = {
        study: read_outcome(folder / f"{ablation.name}.csv") for study, folder in folders.items()
    }
    parts = [f"## {ablation.title}", ablation.setup, markdown(comparison_rows(outcomes)).rstrip()]
    for study, folder in folders.items():
        figure = (folder / f"{ablation.name}.png").relative_to(docs)
        parts.append(f"![{ablation.title}, {study}]({figure})")
        parts.append(f"**{study}.** {conclusion_of(folder, ablation.name)}")
    return "\n\n".join(parts) + "\n"


def comparison_rows(outcomes: dict[str, dict[str, ArmOutcome]]) -> Rows:
    """Return header and rows: how each arm differs from its other, in the studies by name."""
    columns: list[tuple[str, dict[str, ArmOutcome], str]] = []
    for study, arms in outcomes.items():
        if any(arm.learned for arm in arms.values()):
            columns += [(f"start, {study}", arms, "before"), (f"end, {study}", arms, "after")]
        else:
            columns.append((f"untrained, study of {study}", arms, "after"))
    pairs = {
        (arm.name, arm.against): arm.expected or ""
        for arms in outcomes.values()
        for arm in arms.values()
        if arm.against in arms
    }
    rows = [["arm", "against", "the paper", *(title for title, _, _ in columns)]]
    for (name, other), expected in pairs.items():
        cells = [_difference(arms.get(name), arms.get(other), when) for _, arms, when in columns]
        rows.append([name, other, expected, *cells])
    return rows


def _difference(ours: ArmOutcome | None, theirs: ArmOutcome | None, when: str) -> str:
    found = difference(getattr(ours, when), getattr(theirs, when)) if ours and theirs else None
    return found.text("+") if found else ""


def _name(recipe: StudyRecipe) -> str:
    return f"{recipe.tokens:,} tokens"


if __name__ == "__main__":
    publish(list(map(Path, sys.argv[1:])), ROOT / "docs", ROOT / "src/moefy/studies")
