"""Ablations on any model and text: every arm with every seed, and a report at the end."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Int

from moefy.checkpoint.cost import cost, split_config
from moefy.checkpoint.load import load_model
from moefy.checkpoint.reader import fingerprint, read_config, side_files
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.construct.convert import convert
from moefy.data.records import DEMO, open_domains
from moefy.data.strategies import initial_weights
from moefy.errors import CorpusError, UsageError
from moefy.evaluation.heldout import evaluation_windows, heldout_losses
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn, silent
from moefy.report.tables import Rows
from moefy.run_folder import RunFolder, read_marker
from moefy.storage import cached_folder, replace_file
from moefy.studies.ablations import Ablation, ablations_named
from moefy.studies.grid import write_grid
from moefy.studies.recipe import StudyRecipe, StudySettings
from moefy.studies.report import arms_in, write_report
from moefy.studies.runs import OWN, RUNS, Job, Place, Run, job_of, read_runs, write_runs
from moefy.training.run import train
from moefy.training.state import read_log

_AT_ONCE = 8  # windows in one forward pass


def machine_name() -> str:
    """Say what losses are measured on."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} CPU thread{'s' if count > 1 else ''}"


@dataclass(frozen=True)
class Study:
    """What `study` did."""

    folder: Path  # holds study.md, runs.jsonl, and for each ablation a figure
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
    only: Sequence[str] = (),
    recipe: StudyRecipe | str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **settings: Unpack[StudySettings],
) -> Study:
    """Run ablations, each ending in a table and a figure.

    Every arm goes through `convert` and `train` with every seed and is measured on the same
    held-out windows. A run is kept in `out/runs.jsonl` as soon as it is measured; the same call
    skips those and continues one that was stopped. Arms that begin with the same conversion share
    it, and a run that two ablations have is done once.

    Args:
        out: the study's folder.
        model: the dense model, anything `convert` takes.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`. Nothing is trained or calibrated
            on held-out documents.
        only: names of ablations; none means all.
        recipe: a recipe, or a YAML file with `StudyRecipe` keys.
        overwrite: replace the study that is in `out`.
        report: told about progress.
        **settings: single `StudyRecipe` keys; they override the recipe.

    Raises:
        UsageError: an ablation, model, text or setting is not usable.
        OutputError: `out` holds something else, or a study with other settings.
        MoefyError: a run failed; what was measured before it is kept.
    """
    out = Path(out).expanduser()
    wanted = ablations_named(only)
    choice = StudyRecipe.build(recipe, **settings)
    dense = resolve(model, report=report)
    inputs = {"model": fingerprint(dense), "data": str(data)}
    # Everything that can be refused is refused here, before the first model is made.
    jobs, skipped = _jobs(wanted, choice, dense, data, inputs, report)
    owner = RunFolder(
        *(out, "study"),
        overwrite=overwrite,
        sources=(dense, data),
        resumes=True,
        reopens=not overwrite,
        own=(RUNS, "recipe.yaml", "grid.csv", "*.md", "*.png"),
        scratch=("work",),
    )
    with owner as folder:
        folder.begin(inputs | choice.identity())
        work = folder.work
        replace_file(work / "recipe.yaml", choice.to_yaml())
        # Runs of other settings, of another machine's part of the study, are done again.
        keys = {job.place: job.key for job in jobs}
        found = read_runs(work / RUNS)
        runs = {place: run for place, run in found.items() if keys.get(place, run.key) == run.key}
        runner = Runner(work / "work", dense, data, choice, report)
        measured = _run_all(work / RUNS, jobs, runs, runner, report)
        names = {"model": Path(model).name, "data": Path(data).name}
        sized = [job for job in jobs if job.ablation == "size"]
        if splits := {job.arm.name: asdict(job.convert.split) for job in sized if job.convert}:
            about = {**names, "machine": machine_name()}
            write_grid(work, splits, arms_in(work)["size"], dense, about, report)
        tables = write_report(work, choice, skipped, **names)
        folder.finish()
    return Study(out, choice, list(runs.values()), measured, skipped, tables)


def _jobs(
    wanted: Sequence[Ablation],
    recipe: StudyRecipe,
    dense: Path,
    data: str | Path,
    inputs: Mapping[str, Any],
    report: ProgressFn,
) -> tuple[list[Job], dict[str, str]]:
    """Return every run's choices, seed by seed within an ablation, and why others are left out."""
    sizes = {"windows": recipe.windows, "sequence_length": recipe.sequence_length}
    measured_on = {**inputs, **sizes}
    inner = read_config(dense)["intermediate_size"]
    domains = [domain.name for domain in open_domains(data, report=report)]
    jobs: list[Job] = []
    skipped = {}
    for ablation in wanted:
        if ablation.needs == "seven domains":
            try:
                initial_weights("StaticSheared", domains)
            except CorpusError as error:
                skipped[ablation.name] = f"needs SlimPajama's seven domains in --data ({error})"
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


@dataclass(frozen=True)
class Runner:
    """Does one job after another, with models in the folder `work`.

    Every step is a public function of moefy that writes a folder. A complete folder is not made
    again, and a step that was stopped goes on where it was.
    """

    work: Path
    dense: Path
    data: str | Path
    recipe: StudyRecipe
    report: ProgressFn
    # of models that several jobs begin with
    losses: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self, job: Job) -> Run:
        """Do a job, or go on with it, and measure.

        Raises:
            MoefyError: of the step that failed; the folders of the other steps are kept.
        """
        model, trained = self._beginning(job), 0
        # Training keeps the architecture, so it is counted before.
        counted = cost(read_config(model), context=self.recipe.sequence_length)
        if job.model_key not in self.losses:
            self.losses[job.model_key] = self._heldout(model)
        before = after = self.losses[job.model_key]
        if job.train:
            model = self._trained(job, model)
            trained, after = read_log(model)[-1]["tokens"], self._heldout(model)
        return Run(
            *job.place,
            job.arm.against,
            job.arm.expected,
            job.key,
            trained=trained,
            total_params=counted.total_params,
            active_params=counted.active_params,
            flops_per_token=counted.flops_per_token,
            loss_before=statistics.fmean(before.values()),
            loss=statistics.fmean(after.values()),
            domain_loss=after,
            machine=machine_name(),
        )

    def clear(self, left: Iterable[Job]) -> None:
        """Remove trained models, and those that none of the jobs that are left begins with."""
        shutil.rmtree(self.work / "runs", ignore_errors=True)
        kept = {job.model_key for job in left}
        for folder in (self.work / "models").glob("*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def _windows(self) -> dict[str, Int[np.ndarray, "windows sequence"]]:
        """What every model is measured on, tokenised once."""
        return evaluation_windows(
            self.data,
            self.dense,
            windows=self.recipe.windows,
            sequence_length=self.recipe.sequence_length,
            report=self.report,
        )

    def _heldout(self, model: Path) -> dict[str, float]:
        # float32 on every machine: a study's differences can be smaller than bfloat16's rounding.
        network = load_model(model, dtype=torch.float32).to(device())
        return heldout_losses(
            network, self._windows, precision="float32", micro_batch_size=_AT_ONCE
        ).loss

    def _beginning(self, job: Job) -> Path:
        """Return the folder of the model that a job begins with; it is made if it is not there."""
        if job.convert is None:
            return self.dense
        folder = self.work / "models" / job.model_key
        if _is_complete(folder):
            return folder
        if job.arm.start == "scratch":
            config = split_config(read_config(self.dense), **asdict(job.convert.split))
            _write_fresh(config, side_files(self.dense), folder, job.seed)
        else:
            text = job.arm.text or self.data
            convert(self.dense, folder, data=text, recipe=job.convert, report=self.report)
        return folder

    def _trained(self, job: Job, model: Path) -> Path:
        folder = self.work / "runs" / f"{job.key}-trained"
        if job.train and not _is_complete(folder):
            recipe = job.train
            # Keys must not depend on where the dense model is, so the path is filled in here.
            if recipe.teacher == OWN:
                recipe = recipe.model_copy(update={"teacher": str(self.dense)})
            train(model, folder, data=self.data, recipe=recipe, report=self.report)
        return folder


def _write_fresh(config: dict[str, Any], files: Iterable[Path], out: Path, seed: int) -> None:
    """Write a model with transformers' own initial weights, and files beside it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # fork_rng: the caller's random numbers stay what they would be without this.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model(**config)
        network = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with cached_folder(out) as partial:
        network.save_pretrained(partial)
        for file in files:  # the tokenizer's
            shutil.copyfile(file, partial / file.name)


def _is_complete(folder: Path) -> bool:
    # a conversion that goes on after a kill has its config.json before it is finished
    marker = read_marker(folder)
    return marker.state == "finished" if marker else (folder / "config.json").is_file()
