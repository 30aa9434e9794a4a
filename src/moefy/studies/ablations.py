"""The ablations, as data: which arms stand side by side, and what the paper found.

The paper is LLaMA-MoE (arXiv 2406.16554). Its numbers are accuracies on benchmarks after billions
of tokens; a study measures held-out loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moefy.data.strategies import STRATEGIES
from moefy.errors import UsageError
from moefy.recipe import LLAMA_MOE
from moefy.studies.methods import METHODS
from moefy.studies.recipe import StudyRecipe
from moefy.training.recipe import TrainRecipe

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Of the FFN that run, in the ablation of size."""
_RANDOM_ROUTER = {"router_lr_scale": 1.0}
"""A fitted router would be destroyed by this rate, a random one needs it."""
_SCRATCH_RATE = 10
"""Random weights learn at this many times the rate of trained ones."""


@dataclass(frozen=True)
class Arm:
    """One way to get a model.

    Attributes:
        name: in tables.
        start: what it begins with: the dense model, a conversion, or the conversion's architecture
            with fresh weights.
        convert: keys of `ConvertRecipe`.
        train: keys of `TrainRecipe`; None if it is not trained.
        tunes: whether it is tuned on conversations in the end.
        against: the arm that it is compared with.
        expected: how the paper's result says its loss differs from that arm's; `same` is hardly.
    """

    name: str
    start: Literal["dense", "converted", "scratch"] = "converted"
    convert: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] | None = None
    tunes: bool = False
    against: str | None = None
    expected: Literal["lower", "higher", "same"] | None = None


@dataclass(frozen=True)
class Ablation:
    """A question and the arms that answer it.

    Attributes:
        name: for `--only` and file names.
        title: of its section.
        setup: what the arms share, in a sentence or two.
        paper: what the paper found, with its numbers.
        arms: of a study's recipe.
        needs: what a study must have besides a model and text: conversations, or the seven domains
            of SlimPajama.
        measure: what its losses are of.
        why: a study may find the opposite of the paper's result; said where it does.
    """

    name: str
    title: str
    setup: str
    paper: str
    arms: Callable[[StudyRecipe], tuple[Arm, ...]]
    needs: Literal["conversations", "seven domains"] | None = None
    measure: str = "held-out loss, nats per token"
    why: str = ""


_DENSE = Arm("dense", start="dense")


def _split(recipe: StudyRecipe, shared: float, **choices: Any) -> dict[str, Any]:
    counts = {"experts": recipe.experts, "active": recipe.active}
    return counts | {"shared": int(shared * recipe.active)} | choices


def _method(recipe: StudyRecipe, name: str) -> dict[str, Any]:
    """Return the choices of a row of the leaderboard."""
    (method,) = (method for method in METHODS if method.name == name)
    return _split(recipe, method.shared, **method.choices)


def _rescaling(recipe: StudyRecipe) -> tuple[Arm, ...]:
    arms = []
    for active in (recipe.active, recipe.active // 2):
        split = f"{active}/{recipe.experts}"
        counts = LLAMA_MOE | {"experts": recipe.experts, "active": active}
        off = f"{split} not rescaled"
        scales = {off: "unscaled", f"{split} rescaled": "paper"}
        if recipe.experts != active**2:
            scales[f"{split} each expert with weight 1"] = "none"
        for name, repair in scales.items():
            arms.append(
                Arm(
                    name,
                    convert=counts | {"repair": repair},
                    train=_RANDOM_ROUTER,
                    against=None if name == off else off,
                    expected="lower" if repair == "paper" else None,
                )
            )
    return _DENSE, *arms


def _construction(recipe: StudyRecipe) -> tuple[Arm, ...]:
    base = "Independent-Random"
    rows = {
        base: "random",
        "Independent-Clustering": "clustering (up)",
        "Sharing-Inner": "sharing-inner",
        "Sharing-Inter": "sharing-inter",
        "CMoE": "CMoE carve",
        "moefy": "moefy",
    }
    arms = [_DENSE]
    for name, row in rows.items():
        choices = _method(recipe, row)
        arm = Arm(name, convert=choices, train=_rate_of(choices))
        if name != base:
            arm = replace(arm, against=base)
        if "-" in name and name != base:
            arm = replace(arm, expected="higher")
        arms.append(arm)
    return tuple(arms)


def _rate_of(choices: Mapping[str, Any]) -> Mapping[str, Any]:
    return _RANDOM_ROUTER if choices.get("router") == "random" else {}


def _sampling(recipe: StudyRecipe) -> tuple[Arm, ...]:
    base, convert = "StaticSheared", _method(recipe, "moefy")
    arms = [_DENSE]
    for strategy in STRATEGIES:
        if strategy.name == "DynamicUniform":
            continue
        arm = Arm(strategy.name, convert=convert, train={"mixture": strategy.name})
        if strategy.name != base:
            arm = replace(arm, against=base)
        if strategy.is_dynamic:
            arm = replace(arm, expected="higher")
        arms.append(arm)
    return tuple(arms)


def _scratch(recipe: StudyRecipe) -> tuple[Arm, ...]:
    split, base = _method(recipe, "moefy"), "converted"
    rate = recipe.train.get("learning_rate", TrainRecipe().learning_rate)
    fresh = {"learning_rate": _SCRATCH_RATE * rate, **_RANDOM_ROUTER}
    pruned = _method(recipe, "static + refit to the stream")
    return (
        _DENSE,
        Arm(base, convert=split, train={}),
        Arm(
            "same architecture from scratch",
            "scratch",
            split,
            fresh,
            against=base,
            expected="higher",
        ),
        Arm("pruned dense", convert=pruned, train={}, against=base, expected="higher"),
        Arm(
            "pruned dense, not refitted",
            convert=pruned | {"repair": "none"},
            train={},
            against=base,
            expected="higher",
        ),
    )


def _size(recipe: StudyRecipe) -> tuple[Arm, ...]:
    arms, previous = [_DENSE], None
    train: Mapping[str, Any] | None = {} if recipe.train_sizes else None
    for share in reversed(SHARES):
        splits = [(round(share * experts), experts) for experts in recipe.grid]
        splits = [(k, experts) for k, experts in splits if k >= 1 and k == share * experts]
        usual = round(share * recipe.experts), recipe.experts
        splits.sort(key=lambda split: (split != usual, split))
        base = None
        for active, experts in splits:
            name = f"{active}/{experts}"
            counts = {"experts": experts, "active": active, "shared": active // 2}
            arms.append(Arm(name, convert=counts, train=train, against=base or previous))
            if base is None and previous and share < recipe.active / recipe.experts:
                arms[-1] = replace(arms[-1], expected="higher")
            if (name, base) == ("2/8", "4/16"):
                arms[-1] = replace(arms[-1], expected="same")
            base = base or name
        if usual[0] >= 1 and usual[0] == share * recipe.experts:
            counts = {"experts": recipe.experts, "active": usual[0], "shared": usual[0]}
            choices = {"partition": "coactivation", "refit_ridge": 0.01}
            name = f"pruned {usual[0]}/{recipe.experts}"
            arms.append(Arm(name, convert=counts | choices, train=train, against=base))
        previous = base or previous
    return tuple(arms)


def _tuning(recipe: StudyRecipe) -> tuple[Arm, ...]:
    split, pruned = _method(recipe, "moefy"), _method(recipe, "static + refit to the stream")
    return (
        Arm("dense", "dense", tunes=True),
        Arm("converted", convert=split, tunes=True, against="dense"),
        Arm("converted and trained", convert=split, train={}, tunes=True, against="dense"),
        Arm("pruned dense", convert=pruned, tunes=True, against="converted"),
    )


ABLATIONS = (
    Ablation(
        "rescaling",
        "Rescaling",
        "The paper's random split and router. Not rescaled, the weights of the chosen experts sum "
        "to 1; rescaled, the sum is multiplied by E/k, so that a chosen expert enters with about "
        "E/k²; between the two lies weight 1, as in the dense sum.",
        "after 5B tokens rescaling lifts ARC from 21.8 to 28.5 and HellaSwag from 34.6 to 51.0",
        _rescaling,
    ),
    Ablation(
        "construction",
        "Construction",
        "The paper's four ways to build experts, CMoE's (arXiv 2502.04416) and moefy's default, at "
        "the same split. Nothing of the published ones is fitted, and a chosen expert enters with "
        "weight 1. Random routers learn at the full rate, others at a hundredth of it.",
        "Independent-Random ends better than clustering and than both kinds of sharing within the "
        "same budget",
        _construction,
        why="The paper trains for billions of tokens, which can repair any split; after few, most "
        "of the loss is what the split destroyed, and a part that always runs destroys less.",
    ),
    Ablation(
        "sampling",
        "Sampling",
        "One conversion, moefy's default, trained on five mixtures of SlimPajama's domains. The "
        "loss is the mean over the domains, each counting the same, whatever its weight was. "
        "Dynamic weights follow the dense model's losses.",
        "StaticSheared ends better than the dynamic strategies at 30B tokens",
        _sampling,
        needs="seven domains",
        why="The paper judges by benchmarks after thousands of steps; here the weights follow few "
        "measurements, and every domain counts the same in the loss.",
    ),
    Ablation(
        "scratch",
        "From scratch, and pruned",
        f"The same tokens for a converted model, for its architecture with fresh weights (at "
        f"{_SCRATCH_RATE} times the learning rate), and for the dense model pruned to the same "
        "active size.",
        "LLaMA-MoE-3.5B (4/16) averages 57.7 over eleven benchmarks, against 56.4 of "
        "Sheared-LLaMA-2.7B, a pruned dense model, and 55.6 of OpenLLaMA-3B-v2, trained from "
        "scratch on its own budget",
        _scratch,
    ),
    Ablation(
        "size",
        "Expert size and count",
        "moefy's default at every split, half of the active slices shared; pruned is static "
        "pruning to the same active size, a dense model.",
        "4/16, 2/8 and 2/16 average 57.7, 57.6 and 55.5 over eleven benchmarks; other sizes are "
        "its future work",
        _size,
        why="Its averages are those of models trained on 200B tokens, which can make up for what a "
        "coarser split lost; here the splits are compared with less training or none, and fewer, "
        "larger slices leave the router fewer choices.",
    ),
    Ablation(
        "tuning",
        "Instruction tuning",
        "The same conversations for the dense model, for its conversion and for the pruned model.",
        "",
        _tuning,
        needs="conversations",
        measure="loss on the assistant's tokens in held-out conversations, nats per token",
    ),
)


def ablations_named(names: Sequence[str]) -> tuple[Ablation, ...]:
    """Return the ablations of these names; all if there are none.

    Raises:
        UsageError: a name that no ablation has.
    """
    known = {ablation.name: ablation for ablation in ABLATIONS}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"no ablation {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
        )
    return tuple(ablation for ablation in ABLATIONS if not names or ablation.name in names)
