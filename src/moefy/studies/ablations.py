"""The ablations, read from `ablations.yaml`: arms as data, made concrete for a study's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import yaml

from moefy.errors import UsageError
from moefy.studies.recipe import StudyRecipe

_DATA = yaml.safe_load((files("moefy.studies") / "ablations.yaml").read_text())
METHODS: dict[str, dict[str, Any]] = _DATA["methods"]


@dataclass(frozen=True)
class Arm:
    """One way to get a model."""

    name: str
    start: Literal["dense", "converted", "scratch"] = "converted"  # scratch: with fresh weights
    convert: Mapping[str, Any] = field(default_factory=dict)  # keys of ConvertRecipe
    text: str | None = None  # calibration text; None for the study's
    train: Mapping[str, Any] | None = None  # keys of TrainRecipe; None: it is not trained
    rate: float = 1.0  # factor on the study's learning rate
    against: str | None = None  # name of the arm that it is compared with
    expected: Literal["lower", "higher", "same"] | None = None  # its loss, says the paper


@dataclass(frozen=True)
class Ablation:
    """A question and the arms that answer it."""

    name: str  # for --only and file names
    title: str
    setup: str  # what the arms have in common
    entries: Sequence[Mapping[str, Any]]  # arms as they are written in the file
    paper: str = ""  # what it found, and why a study may find something else
    needs: Literal["seven domains"] | None = None

    def arms(self, recipe: StudyRecipe) -> list[Arm]:
        """Return the arms for a study's recipe, the dense model among them."""
        found = [arm_of(entry, recipe) for entry in self.entries]
        return [Arm("dense", start="dense"), *(arm for arm in found if arm is not None)]


def arm_of(entry: Mapping[str, Any], recipe: StudyRecipe) -> Arm | None:
    """Return an arm of the file at a study's split, None where it would be another arm again.

    Args:
        entry: fields of `Arm`, with `{split}` in names, and `method`: a key of `METHODS`; `active`:
            a factor on the study's active slices; `split`: active and all slices, instead of the
            study's; `unless_square`: leave the arm out where E = k², because the paper's factor
            E/k² is 1 there.
        recipe: of the study.
    """
    values = dict(entry)
    # e.g. the second pair of the rescaling ablation runs half as many experts
    usual = int(recipe.active * values.pop("active", 1)), recipe.experts
    active, experts = values.pop("split", usual)
    if values.pop("unless_square", False) and experts == active**2:
        return None
    method = values.pop("method", None)
    if method is not None:
        choices = METHODS[method] | values.get("convert", {})
        values["text"] = choices.pop("text", None)
        shared = int(choices.get("shared", 0) * active)
        values["convert"] = choices | {"experts": experts, "active": active, "shared": shared}
    for key in {"name", "against"} & set(values):
        values[key] = values[key].replace("{split}", f"{active}/{experts}")
    return Arm(**values)


_ABLATIONS: dict[str, dict[str, Any]] = _DATA["ablations"]
# Every method is compared with moefy's default.
_ABLATIONS["methods"]["arms"] = [
    {"name": name, "method": name} | ({} if name == "moefy" else {"against": "moefy"})
    for name in METHODS
]
ABLATIONS = tuple(
    Ablation(name, entries=found.pop("arms"), **found) for name, found in _ABLATIONS.items()
)


def ablations_named(names: Sequence[str]) -> list[Ablation]:
    """Return the ablations of these names, all if there are none.

    Raises:
        UsageError: a name that no ablation has.
    """
    known = [ablation.name for ablation in ABLATIONS]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"no ablation {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
        )
    return [ablation for ablation in ABLATIONS if not names or ablation.name in names]
