"""One layer's construction: the only file that knows all partitions, routers and repairs."""

from __future__ import annotations

import math
from functools import partial

from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.checkpoint.targets import RouterScore
from moefy.construct.ffn import Partition, Routing, SplitFfn, stream
from moefy.construct.partition.alternating import alternating
from moefy.construct.partition.carve import carve
from moefy.construct.partition.clustering import independent_clustering
from moefy.construct.partition.coactivation import coactivation
from moefy.construct.partition.random import independent_random
from moefy.construct.partition.sharing import gradient_split, sharing_inner, sharing_inter
from moefy.construct.repair.refit import least_squares_scale, refit_down_proj
from moefy.construct.repair.rescale import fixed_scale
from moefy.construct.router.ascent import kept_energy_ascent
from moefy.construct.router.energy import expert_energies, scaled
from moefy.construct.router.prototype import mean_gate_router, representative_router
from moefy.construct.router.random import LOGIT_STD, random_router
from moefy.construct.router.ridge import RidgeSystem, log_energies
from moefy.recipe import REGRESSIONS, ConvertRecipe


def split_ffn(
    sample: FfnSample,
    recipe: ConvertRecipe,
    layer_idx: int,
    score: RouterScore = "softmax",
) -> SplitFfn:
    """Split one FFN in closed form; `repair.fit` goes on from there.

    Args:
        sample: the layer; without calibration tokens, only weight-only methods work.
        recipe: the choices; checked.
        layer_idx: keys the random streams.
        score: how the target's router turns logits into weights.
    """
    split = recipe.split
    system = None
    regresses = recipe.partition == "alternating" or recipe.router in REGRESSIONS
    if regresses and 0 < split.chosen < split.routed:
        # factored once: the partition's rounds and the router solve with the same matrix
        system = RidgeSystem(sample.inputs, sample.token_weights, ridge=recipe.router_ridge)
    partition = _partition(sample, recipe, system, layer_idx)
    router = _router(sample, recipe, partition, system, layer_idx)
    routing = Routing(router, split.chosen, score)
    down = _repaired_down(sample, recipe, partition, routing)
    return SplitFfn(partition, routing, sample.gate, sample.up, down)


def _partition(
    sample: FfnSample, recipe: ConvertRecipe, system: RidgeSystem | None, layer_idx: int
) -> Partition:
    split, generator = recipe.split, stream(recipe.seed, "partition", layer_idx)
    match recipe.partition:
        case "random":
            return independent_random(sample.num_neurons, split, generator)
        case "clustering-up":
            return independent_clustering(sample.up, split, generator)
        case "clustering-gate":
            return independent_clustering(sample.gate, split, generator)
        case "coactivation":
            return coactivation(sample, split, generator)
        case "carve":
            return carve(sample, split, generator)
        case "alternating":
            if system is None:  # nothing to choose between, so only which are shared matters
                return coactivation(sample, split, generator)
            return alternating(sample, split, partial(_regression, recipe, system), generator)
    assert sample.importance is not None
    importance = sample.importance.double().cpu().numpy()
    match recipe.partition:
        case "sharing-inner":
            return sharing_inner(importance, split)
        case "sharing-inter":
            return sharing_inter(importance, split)
        case "gradient":
            return gradient_split(importance, split)


def _router(
    sample: FfnSample,
    recipe: ConvertRecipe,
    partition: Partition,
    system: RidgeSystem | None,
    layer_idx: int,
) -> Float[Tensor, "experts hidden"]:
    split = recipe.split
    if split.chosen in (0, split.routed):  # no choice: a router of 0 weighs all exactly alike
        return sample.norm_gain.new_zeros(split.routed, sample.norm_gain.numel())
    match recipe.router:
        case "random":
            generator = stream(recipe.seed, "router", layer_idx)
            return random_router(sample.norm_gain, split.routed, generator)
        case "mean-gate":
            router = mean_gate_router(sample.gate, partition)
        case "representative":
            router = representative_router(sample, partition)
        case "ridge" | "ridge-log" | "ascent":
            assert system is not None
            energies = expert_energies(sample, partition)
            router = _regression(recipe, system, energies)
            if recipe.router == "ascent":
                router = kept_energy_ascent(router, energies, system, split.chosen)
    return scaled(router, sample.norm_gain, LOGIT_STD)


def _regression(
    recipe: ConvertRecipe, system: RidgeSystem, energies: Float[Tensor, "tokens experts"]
) -> Float[Tensor, "experts hidden"]:
    """Return the ridge regression of the energies, or of their logarithms."""
    return system.solve(energies if recipe.router == "ridge" else log_energies(energies))


def _repaired_down(
    sample: FfnSample, recipe: ConvertRecipe, partition: Partition, routing: Routing
) -> Float[Tensor, "hidden slots"]:
    if recipe.repair in ("refit", "fit"):
        return refit_down_proj(sample, partition, routing, ridge=recipe.refit_ridge)
    down = partition.columns(sample.down)
    if recipe.repair == "scale":
        return down * least_squares_scale(sample, partition, routing)
    scale = fixed_scale(recipe)
    if scale != 1:
        if not math.log2(scale).is_integer():  # rounded once, when the layer is written
            down = down.float()
        down[:, len(partition.shared) :] *= scale
    return down
