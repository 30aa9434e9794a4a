"""The rows of the leaderboard: ways to build experts, as choices of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moefy.errors import UsageError
from moefy.recipe import LLAMA_MOE, ConvertRecipe


@dataclass(frozen=True)
class Method:
    """One way to build experts.

    Attributes:
        name: as the table shows it.
        choices: of `ConvertRecipe`, on top of its defaults.
        shared: share of the active slices that always run; 1 means no routing.
        experts: slices of the FFN, if not those of the other methods.
        every_expert: all slices run, whatever share the others get.
        oracle: choose experts by their true energies; a ceiling, not a model.
        flap: static pruning with mean compensation instead of a split.
        own_text: calibrate on text that the dense model samples.
    """

    name: str
    choices: dict[str, Any] = field(default_factory=dict)
    shared: float = 0.5
    experts: int | None = None
    every_expert: bool = False
    oracle: bool = False
    flap: bool = False
    own_text: bool = False

    def recipe(self, experts: int, fraction: float, seed: int) -> ConvertRecipe:
        """Return the recipe of this method where a fraction of the FFN runs.

        Raises:
            UsageError: that fraction of the experts is no whole number.
        """
        experts = self.experts or experts
        active = experts if self.every_expert else round(fraction * experts)
        if not 0 < fraction < 1 or not (
            self.every_expert or math.isclose(active, fraction * experts, abs_tol=1e-6)
        ):
            raise UsageError(
                f"{fraction} of {experts} experts is no whole number between 1 and {experts - 1}"
            )
        shared = int(self.shared * active)
        counts = {"experts": experts, "active": active, "shared": shared, "seed": seed}
        return ConvertRecipe.build(**self.choices | counts)


def _published(
    name: str, partition: str, router: str, repair: str = "none", shared: float = 0.0, **more: Any
) -> Method:
    choices = {"partition": partition, "router": router, "repair": repair, "aim": "ffn", **more}
    return Method(name, choices, shared)


def _variant(what: str, shared: float = 0.5, *, experts: int | None = None, **more: Any) -> Method:
    return Method(f"moefy: {what}", more, shared, experts)


METHODS = (
    Method("moefy"),
    Method("FLAP (static)", shared=1.0, flap=True),
    _published("static + refit", "coactivation", "random", "refit", 1.0, refit_ridge=0.01),
    Method("static + refit to the stream", {"partition": "coactivation", "refit_ridge": 0.01}, 1.0),
    Method("moefy: oracle router", oracle=True),
    Method("all experts (k = E)", LLAMA_MOE | {"repair": "none"}, 0.0, every_expert=True),
    _published("random", "random", "random"),
    _published("random + paper's rescale", "random", "random", "paper"),
    _published("clustering (up)", "clustering-up", "random"),
    _published("clustering (gate)", "clustering-gate", "random"),
    _published("CMoE carve", "carve", "representative", shared=0.5),
    _published("CMoE carve: all shared", "carve", "random", shared=1.0),
    _published("ExpertWeaver's router", "clustering-gate", "mean-gate"),
    _published("sharing-inner", "sharing-inner", "random"),
    _published("sharing-inter", "sharing-inter", "random", shared=0.5),
    _published("gradient + mean gate", "gradient", "mean-gate", shared=0.5),
    _published("co-activation + ridge + refit", "coactivation", "ridge", "refit", 0.5),
    _variant("no repair", repair="none"),
    _variant("scale only", repair="scale"),
    _variant("aim at the FFN", aim="ffn"),
    _variant("router without ascent", router="ridge-log"),
    _variant("router on plain energies", router="ridge"),
    _variant("none shared", 0.0),
    _variant("quarter shared", 0.25),
    _variant("three quarters shared", 0.75),
    _variant("16 slices", experts=16),
    _variant("32 slices", experts=32),
    _variant("random partition", partition="random"),
    _variant("clustering (gate)", partition="clustering-gate"),
    _variant("co-activation", partition="coactivation"),
    _variant("CMoE carve", partition="carve"),
    _variant("gradient", partition="gradient"),
    Method("moefy: the model's own text", own_text=True),
)
"""moefy's default and the baselines; the published ways; the default with one choice changed.

Static pruning gets the smaller ridge because it is better with it: docs/experiments.md, section 3.
The published partitions stand without rescaling: the paper's constant E/k² is about 1 in the
paper's own splits (4, 1 and 2) and 1/16 at 32 of 64, where it is worse than nothing, as the row
"random + paper's rescale" shows.
"""


def methods_named(names: Sequence[str]) -> list[Method]:
    """Return the methods of which a name, or a part of a name, was given; all if none was.

    A whole name means that method alone.

    Raises:
        UsageError: a name that no method has.
    """
    chosen = set()
    for part in names:
        exact = {method.name for method in METHODS if method.name == part}
        found = exact or {method.name for method in METHODS if part and part in method.name}
        if not found:
            known = "; ".join(method.name for method in METHODS)
            raise UsageError(f"no method matches {part!r}; there are {known}")
        chosen |= found
    return [method for method in METHODS if not names or method.name in chosen]
