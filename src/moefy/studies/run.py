"""Ablations on any model and text: every arm with every seed, and a report at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from moefy.checkpoint.reader import fingerprint, read_config
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.data.conversations import read_conversations
from moefy.data.records import DEMO, open_domains
from moefy.data.strategies import initial_weights
from moefy.errors import CorpusError, UsageError
from moefy.progress import Progress, ProgressFn, silent
from moefy.report.tables import Rows
from moefy.run_folder import RunFolder
from moefy.storage import digest, replace_file
from moefy.studies.ablations import Ablation, ablations_named
from moefy.studies.recipe import StudyRecipe, StudySettings
from moefy.studies.report import write_report
from moefy.studies.runner import Runner
from moefy.studies.runs import RUNS, Job, Place, Run, job_of, read_runs, write_runs
from moefy.training.recipe import TuneRecipe


@dataclass(frozen=True)
class Study:
    """What `study` did."""

    folder: Path  # holds study.md, and for each ablation a CSV file and a figure
    recipe: StudyRecipe
    runs: list[Run]  # all that are in the report
    measured: int  # runs that this call measured
    skipped: dict[str, str]  # what is missing in the report, and why
    tables: dict[str, Rows]  # by ablation, as in study.md


def study(
    out: str | Path,
    *,
    model: str | Path = BUILTIN,
    data: str | Path = DEMO,
    sft: str | Path | None = None,
    only: Sequence[str] = (),
    recipe: StudyRecipe | str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **settings: Unpack[StudySettings],
) -> Study:
    """Run ablations, each ending in a table and a figure.

    Every arm goes through `convert`, `train` or `tune` with every seed and is measured on the same
    held-out windows. A run is kept in `out/runs.jsonl` as soon as it is measured; the same call
    skips those and continues one that was stopped. Arms that begin with the same conversion share
    it, and a run that two ablations have is done once.

    Args:
        out: the study's folder.
        model: the dense model, anything `convert` takes.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`. Nothing is trained or calibrated
            on held-out documents.
        sft: conversations, as for `tune`; without them nothing is tuned.
        only: names of ablations; none means all.
        recipe: a recipe, or a YAML file with `StudyRecipe` keys.
        overwrite: replace the study that is in `out`.
        report: told about progress.
        **settings: single `StudyRecipe` keys; they override the recipe.

    Raises:
        UsageError: an ablation, model, text or setting is not usable.
        CorpusError: no conversation is held out, so tuning cannot be measured.
        OutputError: `out` holds something else, or a study with other settings.
        MoefyError: a run failed; what was measured before it is kept.
    """
    out = Path(out).expanduser()
    wanted = ablations_named(only)
    choice = StudyRecipe.build(recipe, **settings)
    dense = resolve(model, report=report)
    inputs = {"model": fingerprint(dense), "data": str(data)}
    # Everything that can be refused is refused here, before the first model is made.
    jobs, skipped = _jobs(wanted, choice, dense, data, sft, inputs, report)
    owner = RunFolder(
        *(out, "study"),
        overwrite=overwrite,
        sources=(dense, data, *([sft] if sft else [])),
        resumes=True,
        reopens=not overwrite,
        own=(RUNS, "recipe.yaml", "*.csv", "*.md", "*.png"),
        scratch=("work",),
    )
    with owner as folder:
        folder.begin(inputs | choice.identity())
        work = folder.work
        replace_file(work / "recipe.yaml", choice.to_yaml())
        # Other conversations make other keys: such runs are done again.
        keys = {job.place: job.key for job in jobs}
        found = read_runs(work / RUNS)
        runs = {place: run for place, run in found.items() if keys.get(place, run.key) == run.key}
        runner = Runner(work / "work", dense, data, sft, choice, report)
        measured = _run_all(work / RUNS, jobs, runs, runner, report)
        names = {"model": Path(model).name, "data": Path(data).name}
        tables = write_report(work, list(runs.values()), choice, skipped, **names)
        folder.finish()
    return Study(out, choice, list(runs.values()), measured, skipped, tables)


def _jobs(
    wanted: Sequence[Ablation],
    recipe: StudyRecipe,
    dense: Path,
    data: str | Path,
    sft: str | Path | None,
    inputs: Mapping[str, Any],
    report: ProgressFn,
) -> tuple[list[Job], dict[str, str]]:
    """Return every run's choices, seed by seed within an ablation, and why others are left out."""
    talks = _fingerprint_of(sft, recipe) if sft else None
    sizes = {"windows": recipe.windows, "sequence_length": recipe.sequence_length}
    measured_on = {**inputs, **sizes, "sft": talks}
    inner = read_config(dense)["intermediate_size"]
    domains = [domain.name for domain in open_domains(data, report=report)]
    jobs: list[Job] = []
    skipped = {}
    for ablation in wanted:
        if reason := _lacks(ablation, domains, has_talks=sft is not None):
            skipped[ablation.name] = reason
            continue
        for seed in range(recipe.first_seed, recipe.first_seed + recipe.seeds):
            for arm in ablation.arms(recipe):
                count = arm.convert.get("experts")
                # A grid may hold counts that one model allows and another does not.
                if count and inner % count:
                    skipped[f"{ablation.name}: {arm.name}"] = (
                        f"intermediate_size {inner} cannot be split into {count} equal experts"
                    )
                else:
                    jobs.append(job_of(ablation.name, arm, recipe, seed, inner, measured_on))
    if not any(job.convert for job in jobs):
        reasons = "; ".join(f"{what}: {why}" for what, why in skipped.items())
        raise UsageError(f"nothing can be studied here ({reasons})")
    return jobs, skipped


def _fingerprint_of(sft: str | Path, recipe: StudyRecipe) -> str:
    """Return a hash of what is said in conversations, wherever they are."""
    if not TuneRecipe.build(**recipe.tune).heldout_conversations:
        raise UsageError("tune.heldout_conversations 0: tuning cannot be measured without any")
    whole, _ = read_conversations(sft)
    if not any(conversation.is_held_out for conversation in whole):
        raise CorpusError(
            f"of the {len(whole)} conversations in {sft} none is held out (one in twenty is), so "
            "tuning cannot be measured: add more"
        )
    return digest({"conversations": [conversation.messages for conversation in whole]})


def _lacks(ablation: Ablation, domains: list[str], *, has_talks: bool) -> str | None:
    """Say what an ablation needs and does not have."""
    if ablation.needs == "conversations" and not has_talks:
        return "needs conversations: name them with --sft"
    if ablation.needs == "seven domains":
        try:
            initial_weights("StaticSheared", domains)
        except CorpusError:
            return (
                "needs the seven domains of SlimPajama (cc, c4, github, wiki, book, arxiv, "
                f"stackexchange) in --data; there are {', '.join(domains)}"
            )
    return None


def _run_all(
    file: Path, jobs: Sequence[Job], runs: dict[Place, Run], runner: Runner, report: ProgressFn
) -> int:
    """Do what is not done, and add it to `runs`; return how many runs were measured."""
    measured = 0
    done = {run.key: run for run in runs.values()}
    for number, job in enumerate(jobs):
        report(Progress("study", number, len(jobs), f"{job.ablation}: {job.arm.name}"))
        if job.place in runs:
            continue
        # Arms of two ablations may be the same run: it is measured once and kept under both names.
        if job.key not in done:
            done[job.key] = runner.run(job)
            measured += 1
        ablation, arm, seed = job.place
        same = replace(done[job.key], ablation=ablation, arm=arm, seed=seed)
        runs[job.place] = replace(same, against=job.arm.against, expected=job.arm.expected)
        write_runs(file, runs)
        # A model is removed as soon as no later job needs it: a study makes hundreds of them.
        runner.clear(other for other in jobs[number + 1 :] if other.key not in done)
    report(Progress("study", len(jobs), len(jobs)))
    return measured
