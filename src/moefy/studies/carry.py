"""Carries one run through: a model, training, tuning, and the measurement of each."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from moefy.checkpoint.cost import cost
from moefy.checkpoint.load import load_model
from moefy.checkpoint.reader import read_config, side_files
from moefy.construct.convert import convert
from moefy.errors import CorpusError
from moefy.evaluation.heldout import evaluation_windows, heldout_losses
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn
from moefy.storage import whole_folder
from moefy.studies.runs import OWN, Steps
from moefy.training.recipe import TrainRecipe
from moefy.training.run import train
from moefy.training.state import read_log
from moefy.training.tune import tune


@dataclass(frozen=True)
class Place:
    """Where a study works and what it reads.

    Attributes:
        work: folder for models, kept between calls until their numbers are in.
        dense: folder of the dense model.
        data: text by domain.
        sft: conversations, if there are any.
        windows, sequence_length: of held-out text, per domain.
        report: told about progress.
        beginnings: held-out loss by domain of the models that runs begin with, by their names:
            several runs begin with the same.
    """

    work: Path
    dense: Path
    data: str | Path
    sft: str | Path | None
    windows: int
    sequence_length: int
    report: ProgressFn
    beginnings: dict[str, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def heldout(self) -> dict[str, Int[np.ndarray, "windows sequence"]]:
        """What every model is measured on, tokenised once."""
        return evaluation_windows(
            self.data,
            self.dense,
            windows=self.windows,
            sequence_length=self.sequence_length,
            report=self.report,
        )


_MEASURING = TrainRecipe(precision="float32", global_batch_size=8, micro_batch_size=8)


def carry(steps: Steps, key: str, place: Place) -> dict[str, Any]:
    """Do a run's steps, or go on with them, and measure.

    Every step is a public function of moefy that writes a folder; one that is complete is not done
    again, one that was stopped goes on.

    Args:
        steps: of the run.
        key: of the run; names its folders.
        place: where.

    Returns:
        The measured fields of `runs.Run`.

    Raises:
        MoefyError: of the step that failed; the folders of the others are kept.
    """
    model = begin(steps, place)
    counted = cost(read_config(model), context=place.sequence_length)
    found: dict[str, Any] = {
        "trained": 0,
        "conversations": 0,
        "total_params": counted.total_params,
        "active_params": counted.active_params,
        "flops_per_token": counted.flops_per_token,
        "curve": [],
    }
    if steps.tune is None:
        name = steps.model_key()
        if name not in place.beginnings:
            place.beginnings[name] = _heldout(model, place)
        losses = place.beginnings[name]
        found |= {"loss_before": _mean(losses), "loss": _mean(losses), "domain_loss": losses}
    if steps.train:
        trained = place.work / "runs" / f"{key}-trained"
        if not _is_complete(trained):
            choices = steps.train.model_dump()
            if steps.train.teacher == OWN:
                choices["teacher"] = str(place.dense)
            train(model, trained, data=place.data, report=place.report, **choices)
        model, log = trained, read_log(trained)
        found["trained"] = log[-1]["tokens"]
        if steps.tune is None:
            losses = _heldout(trained, place)
            found["curve"] = _curve(found["loss_before"], log, _mean(losses))
            found |= {"loss": _mean(losses), "domain_loss": losses}
    if steps.tune:
        assert place.sft is not None
        tuned = place.work / "runs" / f"{key}-tuned"
        if not _is_complete(tuned):
            choices = steps.tune.model_dump()
            tune(model, tuned, data=place.sft, report=place.report, **choices)
        result = json.loads((tuned / "moefy.json").read_text())["result"]
        if result["heldout_after"] is None:
            raise CorpusError(
                f"of the conversations in {place.sft} none is held out (one in twenty is), so "
                "tuning cannot be measured: add more"
            )
        found |= {
            "conversations": result["conversations"],
            "loss_before": result["heldout_before"],
            "loss": result["heldout_after"],
            "domain_loss": {"assistant": result["heldout_after"]},
        }
    return found


def begin(steps: Steps, place: Place) -> Path:
    """Return the folder of the model that a run begins with, making it where it is not there."""
    if steps.start == "dense":
        return place.dense
    folder = place.work / "models" / steps.model_key()
    if _is_complete(folder):
        return folder
    assert steps.convert is not None
    if steps.start == "converted":
        choices = steps.convert.model_dump()
        convert(place.dense, folder, data=place.data, report=place.report, **choices)
        return folder
    architecture = begin(replace(steps, start="converted"), place)
    assert steps.seed is not None
    _write_fresh(architecture, folder, steps.seed)
    return folder


def remove_models(place: Place, kept: set[str]) -> None:
    """Remove the models that no run needs any more.

    Args:
        place: of the study.
        kept: the keys of those that are needed.
    """
    for folder in (place.work / "models").glob("*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def remove_run(place: Place, key: str) -> None:
    """Remove a run's trained and tuned models."""
    for folder in (place.work / "runs").glob(f"{key}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _write_fresh(architecture: Path, out: Path, seed: int) -> None:
    """Write a model of the same architecture with transformers' own initial weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with whole_folder(out) as partial:
        network.save_pretrained(partial)
        for file in (*side_files(architecture), architecture / "config.json"):
            shutil.copyfile(file, partial / file.name)


def _heldout(model: Path, place: Place) -> dict[str, float]:
    """Return the loss by domain on the windows that every model of the study is measured on."""
    place.report(Progress("held-out loss", 0, 1))
    network = load_model(model, dtype=torch.float32).to(device())
    losses = heldout_losses(
        network,
        place.heldout,
        precision=_MEASURING.precision,
        micro_batch_size=_MEASURING.micro_batch_size,
    )
    place.report(Progress("held-out loss", 1, 1))
    return losses


def _curve(before: float, log: list[dict[str, Any]], after: float) -> list[tuple[int, float]]:
    """Return loss by tokens; the ends are measured in float32, as the table's losses are."""
    points = [(line["tokens"], line["heldout_loss"]) for line in log if "heldout_loss" in line]
    between = [(tokens, _mean(losses)) for tokens, losses in points[:-1]]
    return [(0, before), *between, (log[-1]["tokens"], after)]


def _mean(losses: Mapping[str, float]) -> float:
    return statistics.fmean(losses.values())


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()
