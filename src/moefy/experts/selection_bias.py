"""Balancing without a loss: a bias that shifts the choice and not the weights."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.checkpoint.targets import TARGETS
from moefy.errors import UsageError
from moefy.experts.router_trace import routers_of


def shifted_bias(
    bias: Float[Tensor, "layers experts"],
    choices: Float[Tensor, "layers experts"],
    rate: float = 1e-3,
) -> Float[Tensor, "layers experts"]:
    """Return the biases of the next step: b_e - γ·sign(load_e - mean load), layer by layer.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; the load is `RouterSums.choices` of the
    step's whole batch, over all workers and passes, and γ = `rate` in units of the score.
    """
    return bias - rate * (choices - choices.mean(-1, keepdim=True)).sign()


class SelectionBias:
    """The selection biases of a native MoE, which are part of its checkpoint.

    Raises:
        UsageError: the model's routers have none. Trained with a bias that the model folder cannot
            hold, the router would choose other experts wherever the model is loaded.
    """

    def __init__(self, model: Any) -> None:
        routers = routers_of(model)
        found = [getattr(router, "e_score_correction_bias", None) for router in routers]
        self._biases = [bias for bias in found if bias is not None]
        if not routers or len(self._biases) < len(routers):
            with_bias = " or ".join(
                target.model_type for target in TARGETS.values() if target.selection_bias
            )
            raise UsageError(
                f"a {model.config.model_type} model has no selection bias to balance with: choose "
                f"the balance 'switch', or convert with --target {with_bias}"
            )

    @torch.no_grad()
    def update(self, choices: Float[Tensor, "layers experts"], rate: float = 1e-3) -> None:
        """Shift the biases after a step; see `shifted_bias`."""
        biases = torch.stack(self._biases)
        moved = shifted_bias(biases, choices.to(biases), rate)
        for bias, new in zip(self._biases, moved, strict=True):
            bias.copy_(new)
