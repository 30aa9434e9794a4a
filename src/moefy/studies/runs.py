"""One run of a study: an arm with a seed, every choice made, and what it came to."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from moefy.recipe import ConvertRecipe
from moefy.storage import read_records, write_records
from moefy.studies.ablations import Arm
from moefy.studies.recipe import StudyRecipe
from moefy.training.checks import is_dynamic
from moefy.training.recipe import TrainRecipe, TuneRecipe

RUNS = "runs.jsonl"
OWN = "dense"
"""As a teacher: the study's own dense model, wherever it lies."""


@dataclass(frozen=True)
class Steps:
    """What an arm does with a seed, every choice made.

    Attributes:
        start: see `ablations.Arm`.
        convert: of a conversion; None for the dense model.
        train: None if it is not trained.
        tune: None if it is not tuned.
        seed: None where nothing depends on it.
    """

    start: Literal["dense", "converted", "scratch"]
    convert: ConvertRecipe | None
    train: TrainRecipe | None
    tune: TuneRecipe | None
    seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: all that decides what the run comes to."""
        return {
            "start": self.start,
            "convert": self.convert.model_dump(mode="json") if self.convert else None,
            "train": self.train.identity() if self.train else None,
            "tune": self.tune.model_dump(mode="json") if self.tune else None,
            "seed": self.seed,
        }

    def model_keys(self) -> set[str]:
        """Return the names of the models that must be there for it to begin."""
        keys = {self.model_key()}
        if self.start == "scratch":  # the architecture is a conversion's
            keys |= replace(self, start="converted").model_keys()
        return keys

    def model_key(self) -> str:
        """Return a name for the model that it begins with; other arms may begin with the same."""
        whole = self.to_dict()
        parts = {key: whole[key] for key in ("start", "convert", "seed")}
        return "dense" if self.start == "dense" else digest(parts)


@dataclass(frozen=True)
class Run:
    """What an arm came to with one seed.

    Attributes:
        ablation, arm, seed: which run.
        against, expected: see `ablations.Arm`.
        key: of everything that decides the numbers but the machine; runs of the same key are the
            same but for rounding, and where the precision is left to the machine, for that.
        trained: tokens trained on.
        conversations: tuned on.
        total_params, active_params, flops_per_token: see `evaluation.cost`.
        loss_before: before training, or before tuning where it is tuned.
        loss: in the end; of a model that is not trained, the same.
        domain_loss: by domain, in the end; `loss` is their mean.
        curve: held-out loss by tokens trained on, from 0.
        machine: that it ran on.
    """

    ablation: str
    arm: str
    seed: int
    against: str | None
    expected: str | None
    key: str
    trained: int
    conversations: int
    total_params: int
    active_params: int
    flops_per_token: int
    loss_before: float
    loss: float
    domain_loss: dict[str, float]
    curve: list[tuple[int, float]]
    machine: str

    @property
    def place(self) -> tuple[str, str, int]:
        """Which run it is."""
        return self.ablation, self.arm, self.seed


def steps_of(arm: Arm, recipe: StudyRecipe, seed: int, intermediate_size: int) -> Steps:
    """Make every choice of a run.

    Args:
        arm: of an ablation.
        recipe: of the study.
        seed: of partition, router, fresh weights and the order of samples.
        intermediate_size: of the dense model.

    Raises:
        UsageError: the split cannot be made, or a setting is not allowed.
    """
    convert = train = tune = None
    if arm.start != "dense":
        choices = {**recipe.convert, **arm.convert, "seed": seed}
        convert = ConvertRecipe.build(**choices).for_model(intermediate_size)
    if arm.train is not None:
        train = _train_recipe(arm.train, recipe, seed)
    if arm.tunes:
        tune = tune_recipe(recipe, seed)
    fixed = arm.start == "dense" and not (train or tune)
    return Steps(arm.start, convert, train, tune, None if fixed else seed)


def tune_recipe(recipe: StudyRecipe, seed: int) -> TuneRecipe:
    """Return how the arms of a study are tuned."""
    return TuneRecipe.build(**{**recipe.tune, "seed": seed})


def _train_recipe(arm: Mapping[str, Any], recipe: StudyRecipe, seed: int) -> TrainRecipe:
    choices = {
        "tokens": recipe.tokens,
        "sequence_length": recipe.sequence_length,
        **recipe.train,
        **arm,
        "heldout_sequences": recipe.windows,
        "seed": seed,
    }
    made = TrainRecipe.build(**choices)
    every = max(1, made.num_steps // recipe.evaluations)
    choices["evaluate_every_steps"] = every if every < made.num_steps else 0  # the end: by `carry`
    if is_dynamic(made):
        choices = {"mixture_interval_steps": every, "reference_losses": "dense", **choices}
        if made.teacher is None:  # asked for its losses, and for nothing else
            choices |= {"teacher": OWN, "distillation": {"alpha": 0.0}}
    return TrainRecipe.build(**choices)


def run_key(steps: Steps, conditions: Mapping[str, Any]) -> str:
    """Return the key of a run: a hash of its steps and of what they are measured on."""
    return digest({"steps": steps.to_dict(), "conditions": dict(conditions)})


def digest(values: Mapping[str, Any]) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_runs(out: Path) -> dict[tuple[str, str, int], Run]:
    """Read the runs of a folder, by place.

    Raises:
        OutputError: a line is no run of this version.
    """
    runs = read_records(out / RUNS, TypeAdapter(Run).validate_python, what="run")
    return {run.place: run for run in runs}


def write_runs(out: Path, runs: Mapping[tuple[str, str, int], Run]) -> None:
    """Write the runs of a folder, whole."""
    write_records(out / RUNS, (asdict(run) for run in runs.values()))


def seeds_text(runs: Iterable[Run]) -> str:
    """Say which seeds were run, as in "0, 1, 2", or "0 (size: 0, 1, 2)" where ablations differ."""
    found: dict[str, set[int]] = {}
    for run in runs:
        found.setdefault(run.ablation, set()).add(run.seed)
    texts = {name: ", ".join(map(str, sorted(seeds))) for name, seeds in found.items()}
    usual = statistics.mode(texts.values())
    others = "; ".join(f"{name}: {text}" for name, text in texts.items() if text != usual)
    return f"{usual} ({others})" if others else usual


def run_csv_rows(runs: list[Run]) -> list[list[str]]:
    """Return header and rows of an ablation's CSV file: a run a row, in the order of the arms."""
    domains = list(dict.fromkeys(name for run in runs for name in run.domain_loss))
    header = ["arm", "seed", "against", "expected", "trained", "conversations", "total_params"]
    header += ["active_params", "flops_per_token", "loss_before", "loss"]
    rows = [[*header, *(f"loss_{domain}" for domain in domains), "machine"]]
    for run in runs:
        cells = [getattr(run, name) for name in header]
        cells += [*(run.domain_loss.get(domain) for domain in domains), run.machine]
        rows.append(["" if cell is None else str(cell) for cell in cells])
    return rows
