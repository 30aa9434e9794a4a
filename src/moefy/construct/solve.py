"""Regularised normal equations: what routers and repairs both solve."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.errors import CorpusError


class RidgeFactor:
    """The Cholesky factor of G + λ·mean(diag G)·I, in float64.

    Args:
        gram: G, symmetric and positive semidefinite.
        ridge: λ.

    Raises:
        CorpusError: G is not finite.
    """

    def __init__(self, gram: Float[Tensor, "n n"], ridge: float) -> None:
        system = gram.to(torch.float64, copy=True)
        system.diagonal().add_(ridge * system.diagonal().mean().clone().clamp_min(1e-30))
        self._factor, info = torch.linalg.cholesky_ex(system)
        if info or not self._factor.diagonal().isfinite().all():
            raise CorpusError(
                "the activations are not finite on the calibration tokens: the checkpoint is "
                "damaged or its weights overflow float32"
            )

    def solve(self, right: Float[Tensor, "n targets"]) -> Float[Tensor, "n targets"]:
        """Return the solution, in float64."""
        return torch.cholesky_solve(right.double(), self._factor)
