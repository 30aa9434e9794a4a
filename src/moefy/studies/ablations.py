"""The ablations, read from `ablations.yaml`: arms as data, made concrete for a study's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

import yaml

from moefy.errors import UsageError
from moefy.studies.recipe import StudyRecipe

_SHARES = (0.75, 0.5, 0.25, 0.125)  # of the FFN that run, in the ablation of size
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
    tunes: bool = False  # on conversations, at the end
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
    needs: Literal["conversations", "seven domains"] | None = None
    measure: str = "held-out loss, nats per token"

    def arms(self, recipe: StudyRecipe) -> list[Arm]:
        """Return the arms for a study's recipe, the dense model among them."""
        if self.name == "size":
            arms = _size_arms(recipe)
        else:
            found = [arm_of(entry, recipe) for entry in self.entries]
            arms = [arm for arm in found if arm is not None]
        has_dense = any(arm.start == "dense" for arm in arms)
        return arms if has_dense else [Arm("dense", start="dense"), *arms]


def arm_of(entry: Mapping[str, Any], recipe: StudyRecipe) -> Arm | None:
    """Return an arm of the file at a study's split, None where it would be another arm again.

    Args:
        entry: fields of `Arm`, with `{split}` in names, and `method`: a key of `METHODS`; `active`:
            a factor on the study's active slices; `unless_square`: leave the arm out where
            E = k², because the paper's factor E/k² is 1 there.
        recipe: of the study.
    """
    values = dict(entry)
    # e.g. the second pair of the rescaling ablation runs half as many experts
    active, experts = int(recipe.active * values.pop("active", 1)), recipe.experts
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


def _size_arms(recipe: StudyRecipe) -> list[Arm]:
    """Every share of the FFN at every number of experts, and static pruning to the same share.

    In each share the study's own number of experts comes first: the others are compared with it,
    and it is compared with the one of the next larger share.
    """
    arms: list[Arm] = []
    larger = None
    for share in _SHARES:
        # 0.125 of 4 experts is no whole slice: such a split does not exist
        counts = [experts for experts in recipe.grid if (share * experts).is_integer()]
        base = None
        for experts in sorted(counts, key=lambda count: (count != recipe.experts, count)):
            active = int(share * experts)
            split = {"experts": experts, "active": active, "shared": active // 2}
            arm = Arm(f"{active}/{experts}", convert=split, against=base or larger)
            # The paper says that smaller active sizes than its 4/16 lose more.
            if base is None and larger and share < recipe.active / recipe.experts:
                arm = replace(arm, expected="higher")
            # 57.6 and 57.7 over eleven benchmarks: the paper's only pair of one active size.
            if (arm.name, arm.against) == ("2/8", "4/16"):
                arm = replace(arm, expected="same")
            arms.append(arm)
            base = base or arm.name
        active = int(share * recipe.experts)
        if active == share * recipe.experts:
            split = {"experts": recipe.experts, "active": active, "shared": active}
            pruned = METHODS["static + refit to the stream"] | split
            arms.append(Arm(f"pruned {active}/{recipe.experts}", convert=pruned, against=base))
        larger = base or larger
    return arms


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
