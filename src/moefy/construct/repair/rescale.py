"""The constant that is folded into `down_proj` so that the split model has the right scale."""

from __future__ import annotations

from typing import Literal


def down_proj_factor(
    rescale: Literal["paper", "none"], *, num_experts: int, num_active: int
) -> float:
    """Return the factor c of y = c·Σ_i G_i(x)·E_i(x), the G of the chosen experts summing to 1.

    The gate weight of a chosen expert is about 1/k, so an expert enters with the weight c/k.

    - `paper`: c = E/k, LLaMA-MoE (arXiv 2406.16554), section 3.2: the output of k of E experts
      is scaled up by the share that is missing. For 2/16, 4/16 and 2/8 that is 8, 4 and 4, so a
      chosen expert enters with about 4, 1 and 2.
    - `none`: c = k, so a chosen expert enters with the weight 1, as in the dense sum. With k = E
      this is the dense model.

    Args:
        rescale: the rule.
        num_experts: E, routed experts.
        num_active: k, experts per token.
    """
    return num_experts / num_active if rescale == "paper" else float(num_active)
