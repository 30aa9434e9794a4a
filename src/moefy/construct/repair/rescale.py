"""The constant that brings the split model to the right scale."""

from __future__ import annotations

from moefy.recipe import ConvertRecipe
from moefy.split import Split


def paper_rescale(split: Split) -> float:
    """Return the weight with which a chosen expert enters on average.

    LLaMA-MoE (arXiv 2406.16554), section 3.2: y = s·Σ_i G_i(x)·E_i(x) with s = E/k and Σ G_i = 1
    over the k chosen of E experts: the output is scaled up by the share that is missing. A chosen
    expert so enters with about E/k²: 4, 1 and 2 for 2/16, 4/16 and 2/8. In the dense sum it enters
    with 1, in the paper without rescaling with 1/k.

    Deviation: with shared experts, which the paper has not, E and k count the routed ones; where
    all that runs is shared, nothing is scaled.
    """
    return split.routed / split.chosen**2 if split.chosen else 1.0


def fixed_scale(recipe: ConvertRecipe, split: Split) -> float:
    """Return the weight with which a chosen expert enters where nothing was fitted.

    `none` is 1, as in the dense sum; `unscaled` is 1/k, what LLaMA-MoE (arXiv 2406.16554) is
    without its rescaling: the k chosen experts' weights sum to 1; `paper` is `paper_rescale`.
    """
    if recipe.repair == "paper":
        return paper_rescale(split)
    return 1 / split.chosen if recipe.repair == "unscaled" and split.chosen else 1.0
