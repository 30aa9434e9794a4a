"""One run of a study: an arm with a seed, every choice made, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefy.recipe import ConvertRecipe
from moefy.storage import digest, read_records, write_records
from moefy.studies.ablations import Arm
from moefy.studies.recipe import StudyRecipe
from moefy.training.recipe import TrainRecipe

RUNS = "runs.jsonl"
OWN = "dense"
"""As a teacher: the study's own dense model, wherever its folder is."""
_MIXTURES = 8  # times that a dynamic mixture is renewed
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
        steps = {**self._beginning(), "train": self.train.identity() if self.train else None}
        return digest({"steps": steps, "conditions": dict(self.measured_on)})

    def _beginning(self) -> dict[str, Any]:
        # The untouched dense model is the same with every seed, so its key has none.
        fixed = not (self.convert or self.train)
        return {
            "start": self.arm.start,
            "convert": self.convert.identity() if self.convert else None,
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
    total_params: int
    active_params: int
    flops_per_token: int
    loss_before: float  # before training
    loss: float  # at the end, nats per token; without training the same as before
    domain_loss: dict[str, float]  # at the end; `loss` is their mean
    machine: str

    @property
    def place(self) -> Place:
        """Which run it is."""
        return self.ablation, self.arm, self.seed


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
    convert = train = None
    if arm.start != "dense":
        # the closed form, unless an arm is about the fit: many arms, and minutes for each
        made = {"effort": "fast", **recipe.convert, **arm.convert, "seed": seed}
        convert = ConvertRecipe.build(**made).for_model(intermediate_size)
    if arm.train is not None:
        # What the arm says comes before the study's recipe, and the study's measuring before both.
        sizes = {"tokens": recipe.tokens, "sequence_length": recipe.sequence_length}
        fixed = {"heldout_sequences": recipe.windows, "evaluate_every_steps": 0, "seed": seed}
        choices: dict[str, Any] = {**sizes, **recipe.train, **arm.train, **fixed}
        train = TrainRecipe.build(**choices)
        choices["learning_rate"] = arm.rate * train.learning_rate
        if train.is_dynamic:
            every = max(1, train.num_steps // _MIXTURES)
            choices = {"mixture_interval_steps": every, "reference_losses": "dense", **choices}
            if train.teacher is None:  # it only gives the reference losses
                choices |= {"teacher": OWN, "distillation": {"alpha": 0.0}}
        train = TrainRecipe.build(**choices)
    return Job(ablation, arm, seed, convert, train, measured_on)


def read_runs(file: Path) -> dict[Place, Run]:
    """Read a `runs.jsonl`; nothing where there is none.

    Raises:
        OutputError: a line is no run of this version.
    """
    return {run.place: run for run in read_records(file, Run)}


def write_runs(file: Path, runs: Mapping[Place, Run]) -> None:
    """Write a `runs.jsonl`, whole."""
    write_records(file, (asdict(run) for run in runs.values()))
