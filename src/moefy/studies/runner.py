"""Carries out one run: makes or loads a model, trains and tunes it, and measures its loss."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from moefy.checkpoint.card import read_record
from moefy.checkpoint.cost import cost, split_config
from moefy.checkpoint.load import load_model
from moefy.checkpoint.reader import read_config, side_files
from moefy.construct.convert import convert
from moefy.evaluation.heldout import evaluation_windows, heldout_losses
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn
from moefy.storage import cached_folder
from moefy.studies.recipe import StudyRecipe
from moefy.studies.runs import OWN, Job, Run
from moefy.training.run import train
from moefy.training.state import read_log
from moefy.training.tune import tune

_AT_ONCE = 8  # windows in one forward pass


def machine_name() -> str:
    """Say what losses are measured on."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} CPU thread{'s' if count > 1 else ''}"


class Runner:
    """Does one job after another, with models in the folder `work`.

    Every step is a public function of moefy that writes a folder. A complete folder is not made
    again, and a step that was stopped goes on where it was.
    """

    def __init__(
        self,
        work: Path,
        dense: Path,
        data: str | Path,
        sft: str | Path | None,
        recipe: StudyRecipe,
        report: ProgressFn,
    ) -> None:
        self._work, self._dense, self._data, self._sft = work, dense, data, sft
        self._recipe, self._report = recipe, report
        self._losses: dict[str, dict[str, float]] = {}  # of models that several jobs begin with

    def run(self, job: Job) -> Run:
        """Do a job, or go on with it, and measure.

        Raises:
            MoefyError: of the step that failed; the folders of the other steps are kept.
        """
        model = self._beginning(job)
        # Training and tuning keep the architecture, so it is counted before.
        counted = cost(read_config(model), context=self._recipe.sequence_length)
        found: dict[str, Any] = {"trained": 0, "conversations": 0, "curve": []}
        # Where a model is tuned, its loss is that of conversations, before tuning and after.
        if job.tune is None:
            if job.model_key not in self._losses:
                self._losses[job.model_key] = self._heldout(model)
            losses = self._losses[job.model_key]
            found |= {"loss_before": _mean(losses), "loss": _mean(losses), "domain_loss": losses}
        if job.train:
            model = self._trained(job, model)
            log = read_log(model)
            found["trained"] = log[-1]["tokens"]
            if job.tune is None:
                losses = self._heldout(model)
                found |= {"loss": _mean(losses), "domain_loss": losses}
                found["curve"] = _curve(found["loss_before"], log, found["loss"])
        if job.tune:
            found |= self._tuned(job, model)
        return Run(
            *job.place,
            job.arm.against,
            job.arm.expected,
            job.key,
            total_params=counted.total_params,
            active_params=counted.active_params,
            flops_per_token=counted.flops_per_token,
            machine=machine_name(),
            **found,
        )

    def clear(self, left: Iterable[Job]) -> None:
        """Remove trained models, and those that none of the jobs that are left begins with."""
        shutil.rmtree(self._work / "runs", ignore_errors=True)
        kept = {job.model_key for job in left}
        for folder in (self._work / "models").glob("*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def _windows(self) -> dict[str, Int[np.ndarray, "windows sequence"]]:
        """What every model is measured on, tokenised once."""
        return evaluation_windows(
            self._data,
            self._dense,
            windows=self._recipe.windows,
            sequence_length=self._recipe.sequence_length,
            report=self._report,
        )

    def _heldout(self, model: Path) -> dict[str, float]:
        self._report(Progress("held-out loss", 0, 1))
        # float32 on every machine: a study's differences can be smaller than bfloat16's rounding.
        network = load_model(model, dtype=torch.float32).to(device())
        losses = heldout_losses(
            network, self._windows, precision="float32", micro_batch_size=_AT_ONCE
        )
        self._report(Progress("held-out loss", 1, 1))
        return losses

    def _beginning(self, job: Job) -> Path:
        """Return the folder of the model that a job begins with; it is made if it is not there."""
        if job.convert is None:
            return self._dense
        folder = self._work / "models" / job.model_key
        if _is_complete(folder):
            return folder
        if job.arm.start == "scratch":
            config = split_config(read_config(self._dense), **asdict(job.convert.split))
            _write_fresh(config, side_files(self._dense), folder, job.seed)
        else:
            text = job.arm.text or self._data
            convert(self._dense, folder, data=text, recipe=job.convert, report=self._report)
        return folder

    def _trained(self, job: Job, model: Path) -> Path:
        folder = self._work / "runs" / f"{job.key}-trained"
        if job.train and not _is_complete(folder):
            recipe = job.train
            # Keys must not depend on where the dense model is, so the path is filled in here.
            if recipe.teacher == OWN:
                recipe = recipe.model_copy(update={"teacher": str(self._dense)})
            train(model, folder, data=self._data, recipe=recipe, report=self._report)
        return folder

    def _tuned(self, job: Job, model: Path) -> dict[str, Any]:
        assert self._sft is not None
        folder = self._work / "runs" / f"{job.key}-tuned"
        if not _is_complete(folder):
            tune(model, folder, data=self._sft, recipe=job.tune, report=self._report)
        # From the file, since the folder may have been complete before this call.
        record = read_record(folder)
        assert record is not None
        result = record["result"]
        return {
            "conversations": result["conversations"],
            "loss_before": result["heldout_before"],
            "loss": result["heldout_after"],
            "domain_loss": {"assistant": result["heldout_after"]},
        }


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


def _curve(before: float, log: list[dict[str, Any]], after: float) -> list[tuple[int, float]]:
    """Return loss by tokens. Both ends are measured in float32, as the table's losses are."""
    points = [(line["tokens"], line["heldout_loss"]) for line in log if "heldout_loss" in line]
    between = [(tokens, _mean(losses)) for tokens, losses in points[:-1]]
    return [(0, before), *between, (log[-1]["tokens"], after)]


def _mean(losses: Mapping[str, float]) -> float:
    return statistics.fmean(losses.values())


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()
