"""One run of a study: an arm with a seed, every choice made, and its results."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from moefy.recipe import ConvertRecipe
from moefy.storage import digest, read_records, write_records
from moefy.studies.ablations import Arm
from moefy.studies.recipe import StudyRecipe
from moefy.training.recipe import TrainRecipe, TuneRecipe

RUNS = "runs.jsonl"
OWN = "dense"
"""As a teacher: the study's own dense model, wherever its folder is."""
Place = tuple[str, str, int]
"""Ablation, arm and seed: which run it is."""


@dataclass(frozen=True)
class Job:
    """A run that is to be done, every choice made; None is a step that it does not take."""

    ablation: str
    arm: Arm
    seed: int  # of partition, router, fresh weights and the order of samples
    convert: ConvertRecipe | None
    train: TrainRecipe | None
    tune: TuneRecipe | None
    measured_on: Mapping[str, Any]  # model, text and windows, as plain values

    @property
    def place(self) -> Place:
        """Which run it makes."""
        return self.ablation, self.arm.name, self.seed

    @property
    def model_key(self) -> str:
        """Name of the model that it begins with; other jobs may begin with the same."""
        return "dense" if self.convert is None else digest(self._beginning())

    @property
    def key(self) -> str:
        """Hash of everything that decides the results, except the machine."""
        train = self.train.identity() if self.train else None
        tune = self.tune.model_dump(mode="json") if self.tune else None
        steps = {**self._beginning(), "train": train, "tune": tune}
        return digest({"steps": steps, "conditions": dict(self.measured_on)})

    def _beginning(self) -> dict[str, Any]:
        # The untouched dense model is the same with every seed, so its key has none.
        fixed = not (self.convert or self.train or self.tune)
        return {
            "start": self.arm.start,
            "convert": self.convert.model_dump(mode="json") if self.convert else None,
            "text": self.arm.text,
            "seed": None if fixed else self.seed,
        }


@dataclass(frozen=True)
class Run:
    """What an arm came to with one seed.

    Runs of the same key have the same results except for rounding, and for the precision of
    training where the recipe leaves it to the machine.
    """

    ablation: str
    arm: str
    seed: int
    against: str | None  # see `Arm`
    expected: str | None  # see `Arm`
    key: str  # see `Job`
    trained: int  # tokens
    conversations: int  # tuned on
    total_params: int
    active_params: int
    flops_per_token: int
    loss_before: float  # before training, or before tuning where it is tuned
    loss: float  # at the end, nats per token; without training the same as before
    domain_loss: dict[str, float]  # at the end; `loss` is their mean
    curve: list[tuple[int, float]]  # tokens trained on and held-out loss, from 0 tokens
    machine: str

    @property
    def place(self) -> Place:
        """Which run it is."""
        return self.ablation, self.arm, self.seed


_RUN = TypeAdapter(Run)


def job_of(
    ablation: str,
    arm: Arm,
    recipe: StudyRecipe,
    seed: int,
    intermediate_size: int,
    measured_on: Mapping[str, Any],
) -> Job:
    """Make every choice of a run.

    Raises:
        UsageError: the split cannot be made, or a setting is not allowed.
    """
    convert = train = tune = None
    if arm.start != "dense":
        convert = ConvertRecipe.build(**{**recipe.convert, **arm.convert, "seed": seed})
        convert = convert.for_model(intermediate_size)
    if arm.train is not None:
        train = _train_recipe(arm, recipe, seed)
    if arm.tunes:
        tune = TuneRecipe.build(**{**recipe.tune, "seed": seed})
    else:  # then the conversations do not change its results
        measured_on = {name: value for name, value in measured_on.items() if name != "sft"}
    return Job(ablation, arm, seed, convert, train, tune, measured_on)


def _train_recipe(arm: Arm, recipe: StudyRecipe, seed: int) -> TrainRecipe:
    # What the arm says comes before the study's recipe, and the study's measuring before both.
    sizes = {"tokens": recipe.tokens, "sequence_length": recipe.sequence_length}
    fixed = {"heldout_sequences": recipe.windows, "seed": seed}
    choices: dict[str, Any] = {**sizes, **recipe.train, **(arm.train or {}), **fixed}
    made = TrainRecipe.build(**choices)
    every = max(1, made.num_steps // recipe.evaluations)
    # The end is measured by the study itself, in float32, as the losses of all other models.
    choices["evaluate_every_steps"] = every if every < made.num_steps else 0
    choices["learning_rate"] = arm.rate * made.learning_rate
    if made.is_dynamic:
        choices = {"mixture_interval_steps": every, "reference_losses": "dense", **choices}
        if made.teacher is None:  # it only gives the reference losses
            choices |= {"teacher": OWN, "distillation": {"alpha": 0.0}}
    return TrainRecipe.build(**choices)


def read_runs(file: Path) -> dict[Place, Run]:
    """Read a `runs.jsonl`; nothing where there is none.

    Raises:
        OutputError: a line is no run of this version.
    """
    return {run.place: run for run in read_records(file, Run)}


def write_runs(file: Path, runs: Mapping[Place, Run]) -> None:
    """Write a `runs.jsonl`, whole."""
    write_records(file, (asdict(run) for run in runs.values()))


def run_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return header and rows of an ablation's CSV file, which `read_arms` reads back."""
    domains = list(dict.fromkeys(name for run in runs for name in run.domain_loss))
    # Keys are left out, so that the files do not change when a recipe gets a new setting.
    others = {"ablation", "key", "domain_loss", "curve"}
    plain = [f.name for f in fields(Run) if f.name not in others]
    rows = [[*plain, *(f"loss_{domain}" for domain in domains), "curve"]]
    for run in runs:
        cells = [getattr(run, name) for name in plain]
        cells += [run.domain_loss.get(domain) for domain in domains]
        rows.append(["" if c is None else str(c) for c in (*cells, json.dumps(run.curve))])
    return rows


def read_arms(file: Path) -> dict[str, list[Run]]:
    """Read an ablation's CSV file: runs by arm, in its order."""
    arms: dict[str, list[Run]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            losses = {
                name.removeprefix("loss_"): cell
                for name, cell in row.items()
                if cell and name.startswith("loss_") and name != "loss_before"
            }
            more = {"key": "", "domain_loss": losses, "curve": json.loads(row["curve"])}
            values = {name: cell or None for name, cell in row.items()} | more
            run = _RUN.validate_python({"ablation": file.stem} | values)
            arms.setdefault(run.arm, []).append(run)
    return arms
