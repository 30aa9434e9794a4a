"""The paper's ablations on any model and text: resumable, and a report in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moefy.checkpoint.reader import fingerprint, read_config
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.data.domains import DEMO, open_domains
from moefy.data.strategies import initial_weights
from moefy.errors import CorpusError, OutputError, UsageError
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import changed_settings, replace_file, storage_errors
from moefy.studies.ablations import Ablation, Arm, ablations_named
from moefy.studies.carry import Place, carry, remove_models, remove_run
from moefy.studies.grid import SPEED, Split, split_named
from moefy.studies.recipe import StudyRecipe
from moefy.studies.report import write_report
from moefy.studies.runs import (
    RUNS,
    Run,
    Steps,
    read_runs,
    run_key,
    steps_of,
    write_runs,
)
from moefy.studies.speeds import machine_name, measure_speeds
from moefy.studies.toy import SMOKE, make_toys
from moefy.tuning.conversations import read_conversations

IDENTITY = "study.json"


@dataclass(frozen=True)
class Study:
    """What `study` did.

    Attributes:
        folder: holds `study.md`, and for each ablation its CSV files and its figure.
        recipe: every choice that was made.
        runs: all that are in the folder.
        measured: of those, by this call.
        skipped: what could not be run, and why.
        conclusions: by ablation.
    """

    folder: Path
    recipe: StudyRecipe
    runs: list[Run]
    measured: int
    skipped: dict[str, str]
    conclusions: dict[str, str]


@dataclass(frozen=True)
class _Job:
    ablation: Ablation
    arm: Arm
    seed: int
    steps: Steps
    key: str


def study(
    out: str | Path,
    *,
    model: str | Path = BUILTIN,
    data: str | Path = DEMO,
    sft: str | Path | None = None,
    only: Sequence[str] = (),
    smoke: bool = False,
    keep: bool = False,
    report_only: bool = False,
    recipe: str | Path | None = None,
    report: ProgressFn = silent,
    **choices: Any,
) -> Study:
    """Run ablations, each ending in a table, a figure and a paragraph of conclusion.

    Every arm goes through `convert`, `train` or `tune` with every seed and is measured on the same
    held-out windows. A run's numbers are kept in `out/runs.jsonl` as soon as they are there; the
    same call skips those and continues one that was stopped. Arms that begin with the same
    conversion share it, and a run that two ablations have is done once.

    Args:
        out: the study's folder.
        model: the dense model, anything `convert` takes.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`. Held-out documents are only
            measured on.
        sft: conversations, as for `tune`; without them nothing is tuned.
        only: names of ablations; none means all.
        smoke: a toy model, toy text and toy sizes instead, to see that everything runs.
        keep: keep the models.
        report_only: run nothing; write the report of the runs that are there.
        recipe: a YAML file with `StudyRecipe` keys.
        report: told about progress.
        **choices: single `StudyRecipe` keys; they override the file.

    Raises:
        UsageError: an ablation, model, text or setting is not usable.
        OutputError: `out` holds a study with other settings.
        MoefyError: a run failed; what was measured is kept.
    """
    out = Path(out).expanduser()
    wanted = ablations_named(only)
    if smoke:
        choice = StudyRecipe.build(recipe, **SMOKE | choices)
    else:
        choice = StudyRecipe.build(recipe, **choices)
    _check_place(out)
    if smoke:
        toys = out / "toys"
        make_toys(toys, report)
        model, data, sft = toys / "model", toys / "text", toys / "conversations.jsonl"
    dense = resolve(model, report=report)
    conditions = {
        "model": fingerprint(dense),
        "data": str(data),
        "sft": str(sft) if sft else None,
        **choice.identity(),
    }
    jobs, skipped = _jobs(wanted, choice, dense, data, sft, conditions, report)
    _keep_identity(out, conditions)
    replace_file(out / "recipe.yaml", choice.to_yaml())
    place = Place(out / "work", dense, data, sft, choice.windows, choice.sequence_length, report)
    if report_only:
        runs, measured = read_runs(out), 0
        skipped |= _missing(jobs, runs)
    else:
        runs, measured = _run_all(out, jobs, place, keep)
    splits = {split for job in jobs if (split := _size_split(job))}
    if splits and not report_only:
        _measure_speeds(out, read_config(dense), sorted(splits), choice, report)
    facts = {"model": Path(model).name, "data": Path(data).name}
    if smoke:
        facts |= {"model": "a toy model", "data": "toy text"}
    conclusions = write_report(out, list(runs.values()), choice, facts, skipped)
    return Study(out, choice, list(runs.values()), measured, skipped, conclusions)


def _missing(jobs: Sequence[_Job], runs: dict[tuple[str, str, int], Run]) -> dict[str, str]:
    """Name the arms of which seeds are missing, and say which."""
    seeds: dict[str, list[str]] = {}
    for job in jobs:
        if (job.ablation.name, job.arm.name, job.seed) not in runs:
            seeds.setdefault(f"{job.ablation.name}: {job.arm.name}", []).append(str(job.seed))
    return {name: f"not yet, seed {', '.join(found)}" for name, found in seeds.items()}


def _size_split(job: _Job) -> Split | None:
    return split_named(job.arm.name) if job.ablation.name == "size" else None


def _measure_speeds(
    out: Path,
    config: dict[str, Any],
    splits: list[Split],
    recipe: StudyRecipe,
    report: ProgressFn,
) -> None:
    """Time the splits, unless just that was done."""
    about = {
        "splits": [split.name for split in splits],
        "machine": machine_name(),
        **{name: getattr(recipe, name) for name in ("prompt_tokens", "new_tokens", "rounds")},
    }
    file = out / SPEED
    if file.is_file() and json.loads(file.read_text())["about"] == about:
        return
    speeds = measure_speeds(config, splits, recipe, report)
    replace_file(file, json.dumps({"about": about, "tokens_per_s": speeds}, indent=2) + "\n")


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: choose another output folder")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any((out / name).exists() for name in (IDENTITY, RUNS, "toys"))
    ):
        raise OutputError(f"{out} holds files but no study: choose another folder")


def _keep_identity(out: Path, conditions: dict[str, Any]) -> None:
    """Refuse to mix results of different settings in one folder.

    Raises:
        OutputError: the folder's study has others.
    """
    file = out / IDENTITY
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        found = json.loads(file.read_text())
        # conversations may be added later, or left out
        conditions = conditions | {"sft": conditions["sft"] or found["sft"]}
        if changed := changed_settings({"sft": conditions["sft"], **_given(found)}, conditions):
            raise OutputError(
                f"{out} holds a study with other settings ({'; '.join(changed)}): give the same "
                "ones to continue it, or choose another folder"
            )
    replace_file(file, json.dumps(conditions, indent=2) + "\n")


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _jobs(
    wanted: Sequence[Ablation],
    recipe: StudyRecipe,
    dense: Path,
    data: str | Path,
    sft: str | Path | None,
    conditions: dict[str, Any],
    report: ProgressFn,
) -> tuple[list[_Job], dict[str, str]]:
    """Make every choice of every run before the first is begun.

    Returns:
        The jobs, seed by seed within an ablation, and why others are not among them.

    Raises:
        UsageError: a setting is not usable, or nothing is left to do.
    """
    inner = read_config(dense)["intermediate_size"]
    domains = [domain.name for domain in open_domains(data, report=report)]
    if sft and any(ablation.needs == "conversations" for ablation in wanted):
        read_conversations(sft)  # what is wrong with them is known now, and not hours later
    jobs, skipped = [], {}
    for ablation in wanted:
        if reason := _lacks(ablation, domains, sft):
            skipped[ablation.name] = reason
            continue
        for seed in range(recipe.first_seed, recipe.first_seed + recipe.seeds):
            for arm in ablation.arms(recipe):
                split = arm.convert.get("experts")
                if split and inner % split:
                    skipped[f"{ablation.name}: {arm.name}"] = (
                        f"intermediate_size {inner} cannot be split into {split} equal experts"
                    )
                    continue
                steps = steps_of(arm, recipe, seed, dense, inner)
                about = {key: conditions[key] for key in ("model", "data")}
                about |= {"windows": recipe.windows, "sequence_length": recipe.sequence_length}
                if steps.tune:
                    about["sft"] = conditions["sft"]
                jobs.append(_Job(ablation, arm, seed, steps, run_key(steps, about)))
    if not any(job.arm.start != "dense" for job in jobs):
        reasons = "; ".join(f"{what}: {why}" for what, why in skipped.items())
        raise UsageError(f"nothing can be studied here ({reasons})")
    return jobs, skipped


def _lacks(ablation: Ablation, domains: list[str], sft: str | Path | None) -> str | None:
    """Say what an ablation needs and does not have."""
    if ablation.needs == "conversations" and sft is None:
        return "needs conversations: name them with --sft"
    if ablation.needs == "conversations" and not (find_spec("trl") and find_spec("peft")):
        return "needs the packages trl and peft: pip install 'moefy[tune]'"
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
    out: Path, jobs: list[_Job], place: Place, keep: bool
) -> tuple[dict[tuple[str, str, int], Run], int]:
    """Do what is not done; return all runs of the folder, and how many were measured now."""
    runs = read_runs(out)
    measured = 0
    done = {run.key: run for run in runs.values()}
    for number, job in enumerate(jobs):
        where = (job.ablation.name, job.arm.name, job.seed)
        place.report(Progress("study", number, len(jobs), f"{job.ablation.name}: {job.arm.name}"))
        if known := done.get(job.key):
            found = {name: getattr(known, name) for name in _MEASURED}
        else:
            found = carry(job.steps, job.key, place) | {"machine": machine_name()}
            measured += 1
        run = Run(*where, job.arm.against, job.arm.expected, job.key, **found)
        if runs.get(where) != run:
            runs[where] = done[job.key] = run
            write_runs(out, runs)
        if not keep:
            remove_run(place, job.key)
            left = [each.steps for each in jobs[number + 1 :] if each.key not in done]
            remove_models(place, set().union(*(steps.model_keys() for steps in left)))
    place.report(Progress("study", len(jobs), len(jobs)))
    return runs, measured


_MEASURED = (
    "trained",
    "conversations",
    "total_params",
    "active_params",
    "flops_per_token",
    "loss_before",
    "loss",
    "domain_loss",
    "curve",
    "machine",
)
