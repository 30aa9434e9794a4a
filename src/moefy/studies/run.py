"""The paper's ablations on any model and text: resumable, and a report in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from moefy.checkpoint.reader import fingerprint, read_config
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.data.conversations import read_conversations
from moefy.data.domains import open_domains
from moefy.data.records import DEMO
from moefy.data.strategies import initial_weights
from moefy.errors import CorpusError, OutputError, UsageError
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import changed_settings, refuse_file, replace_file, storage_errors
from moefy.studies.ablations import ABLATIONS, Ablation, Arm, ablations_named
from moefy.studies.carry import Place, carry, remove_models, remove_run
from moefy.studies.grid import SPEED, Split, split_named
from moefy.studies.recipe import StudyRecipe, StudySettings
from moefy.studies.report import write_page, write_tables
from moefy.studies.runs import (
    RUNS,
    Run,
    Steps,
    digest,
    read_runs,
    run_key,
    steps_of,
    tune_recipe,
    write_runs,
)
from moefy.studies.speeds import machine_name, measure_speeds
from moefy.studies.toy import SMOKE, make_toys

IDENTITY = "study.json"


@dataclass(frozen=True)
class Study:
    """What `study` did.

    Attributes:
        folder: holds `study.md`, and for each ablation its CSV files and its figure.
        recipe: every choice that was made.
        runs: all that are in the folder and of these settings.
        measured: of those, by this call.
        skipped: what is not in the report or not whole in it, and why.
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

    @property
    def place(self) -> tuple[str, str, int]:
        """Which run it makes; see `runs.Run`."""
        return self.ablation.name, self.arm.name, self.seed


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
    recipe: StudyRecipe | str | Path | None = None,
    report: ProgressFn = silent,
    **settings: Unpack[StudySettings],
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
        keep: keep the models; later calls for the same folder keep them too.
        report_only: run nothing; write the report of the runs that are there.
        recipe: a `StudyRecipe` or a YAML file with its keys.
        report: told about progress.
        **settings: single `StudyRecipe` keys; they override the recipe.

    Raises:
        UsageError: an ablation, model, text or setting is not usable, or there are no runs to
            report.
        CorpusError: no conversation is held out, so tuning cannot be measured.
        OutputError: `out` holds a study with other settings.
        MoefyError: a run failed; what was measured is kept.
    """
    out = Path(out).expanduser()
    wanted = ablations_named(only)
    if smoke:
        choice = StudyRecipe.build(recipe, **{**SMOKE, **settings})
    else:
        choice = StudyRecipe.build(recipe, **settings)
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
    judged_on = {name: conditions[name] for name in ("model", "data", "windows", "sequence_length")}
    talks = _fingerprint_of(sft, choice) if sft else None
    jobs, skipped = _jobs(wanted, choice, dense, data, talks, judged_on, report)
    if not any(job.arm.start != "dense" for job in jobs):
        reasons = "; ".join(f"{what}: {why}" for what, why in skipped.items())
        raise UsageError(f"nothing can be studied here ({reasons})")
    if report_only and not (out / RUNS).is_file():
        raise UsageError(f"{out} holds no runs to report: leave --report-only out to make them")
    _keep_identity(out, conditions)
    replace_file(out / "recipe.yaml", choice.to_yaml())
    place = Place(out / "work", dense, data, sft, choice.windows, choice.sequence_length, report)
    measured = 0 if report_only else _run_all(out, jobs, place, keep=keep)
    found = read_runs(out)
    others = {
        job.place
        for job in _jobs_found(found, choice, dense, data, talks, judged_on, report)
        if found[job.place].key != job.key
    }
    runs = {place: run for place, run in found.items() if place not in others}
    if not runs:
        raise UsageError(f"no run in {out} is of these settings: give those of its recipe.yaml")
    reported = {name for name, _, _ in runs}
    skipped = {what: why for what, why in skipped.items() if what not in reported}
    skipped |= _missing(jobs, found)
    skipped |= {
        f"{name}: {arm}, seed {seed}": "was run with other settings"
        for name, arm, seed in sorted(others)
    }
    splits = {split for job in jobs if (split := _size_split(job))}
    if splits and not report_only:
        _measure_speeds(out, read_config(dense), sorted(splits), choice, report)
    facts = {"model": Path(model).name, "data": Path(data).name}
    if smoke:
        facts |= {"model": "a toy model", "data": "toy text"}
    skipped |= write_tables(out, list(runs.values()), choice, facts)
    conclusions = write_page(out, list(runs.values()), choice, facts, skipped)
    return Study(out, choice, list(runs.values()), measured, skipped, conclusions)


def _jobs_found(
    found: dict[tuple[str, str, int], Run], recipe: StudyRecipe, *where: Any
) -> list[_Job]:
    """Return what would make the runs that are on file, whatever this call was asked for."""
    on_file = {name for name, _, _ in found}
    numbers = [seed for _, _, seed in found]
    seeds = {"first_seed": min(numbers), "seeds": max(numbers) + 1 - min(numbers)}
    ablations = [ablation for ablation in ABLATIONS if ablation.name in on_file]
    jobs, _ = _jobs(ablations, recipe.model_copy(update=seeds), *where)
    return [job for job in jobs if job.place in found]


def _missing(jobs: Sequence[_Job], runs: dict[tuple[str, str, int], Run]) -> dict[str, str]:
    """Name the arms of which seeds are missing, and say which."""
    seeds: dict[str, list[str]] = {}
    for job in jobs:
        if job.place not in runs:
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
    refuse_file(out)
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
    talks: str | None,
    judged_on: dict[str, Any],
    report: ProgressFn,
) -> tuple[list[_Job], dict[str, str]]:
    """Make every choice of every run before the first is begun.

    `talks` is the fingerprint of the conversations, and like `judged_on` a part of the keys.

    Returns:
        The jobs, seed by seed within an ablation, and why others are not among them.

    Raises:
        UsageError: a setting is not usable.
    """
    inner = read_config(dense)["intermediate_size"]
    domains = [domain.name for domain in open_domains(data, report=report)]
    jobs, skipped = [], {}
    for ablation in wanted:
        if reason := _lacks(ablation, domains, talks):
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
                steps = steps_of(arm, recipe, seed, inner)
                about = judged_on | ({"sft": talks} if steps.tune else {})
                jobs.append(_Job(ablation, arm, seed, steps, run_key(steps, about)))
    return jobs, skipped


def _fingerprint_of(sft: str | Path, recipe: StudyRecipe) -> str:
    """Return a hash of what is said in conversations, wherever they lie.

    Raises:
        UsageError: none is to be held out.
        CorpusError: none can be.
    """
    whole, _ = read_conversations(sft)
    if not tune_recipe(recipe, seed=0).heldout_conversations:
        raise UsageError("tune.heldout_conversations 0: tuning cannot be measured without any")
    if not any(conversation.is_held_out for conversation in whole):
        raise CorpusError(
            f"of the {len(whole)} conversations in {sft} none is held out (one in twenty is), so "
            "tuning cannot be measured: add more"
        )
    return digest({"conversations": [conversation.messages for conversation in whole]})


def _lacks(ablation: Ablation, domains: list[str], talks: str | None) -> str | None:
    """Say what an ablation needs and does not have."""
    if ablation.needs == "conversations" and talks is None:
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


def _run_all(out: Path, jobs: list[_Job], place: Place, *, keep: bool) -> int:
    """Do what is not done; return how many runs were measured now."""
    kept = place.work / "kept"
    if keep:
        place.work.mkdir(exist_ok=True)
        kept.touch()
    runs = read_runs(out)
    measured = 0
    done = {run.key: run for run in runs.values()}
    for number, job in enumerate(jobs):
        place.report(Progress("study", number, len(jobs), f"{job.ablation.name}: {job.arm.name}"))
        if known := done.get(job.key):
            found = {name: getattr(known, name) for name in _MEASURED}
        else:
            found = carry(job.steps, job.key, place) | {"machine": machine_name()}
            measured += 1
        run = Run(*job.place, job.arm.against, job.arm.expected, job.key, **found)
        if runs.get(run.place) != run:
            runs[run.place] = done[job.key] = run
            write_runs(out, runs)
        if not kept.exists():
            remove_run(place, job.key)
            left = [each.steps for each in jobs[number + 1 :] if each.key not in done]
            remove_models(place, set().union(*(steps.model_keys() for steps in left)))
    place.report(Progress("study", len(jobs), len(jobs)))
    return measured


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
