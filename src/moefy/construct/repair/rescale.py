"""The constant that brings the split model to the right scale where nothing is fitted."""

from __future__ import annotations

from moefy.recipe import ConvertRecipe


def fixed_scale(recipe: ConvertRecipe) -> float:
    """Return the weight with which a chosen expert enters on average.

    `none` is 1, as in the dense sum. `unscaled` is 1/k: the k chosen experts' weights sum to 1, as
    in LLaMA-MoE without rescaling. `paper` is LLaMA-MoE (arXiv 2406.16554), section 3.2:
    y = s·Σ_i G_i(x)·E_i(x) with s = E/k and Σ G_i = 1 over the k chosen of E experts, so that a
    chosen expert enters with about E/k²: 4, 1 and 2 for 2/16, 4/16 and 2/8.

    Deviation: with shared experts, which the paper has not, E and k count the routed ones; where
    all that runs is shared, nothing is scaled.
    """
    split = recipe.split
    if not split.chosen:
        return 1.0
    if recipe.repair == "paper":
        return split.routed / split.chosen**2
    return 1 / split.chosen if recipe.repair == "unscaled" else 1.0
