"""Regularised normal equations: what routers and repairs both solve."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class RidgeFactor:
    """The Cholesky factor of G + λ·mean(diag G)·I, in float64; `added` is λ·mean(diag G)."""

    def __init__(self, gram: Float[Tensor, "n n"], ridge: float) -> None:
        system = gram.to(torch.float64, copy=True)
        self.added = ridge * max(float(system.diagonal().mean()), 1e-30)
        system.diagonal().add_(self.added)
        self._factor = torch.linalg.cholesky(system, out=system)  # in place: G may take 1 GiB

    def solve(self, right: Float[Tensor, "n targets"]) -> Float[Tensor, "n targets"]:
        """Return the solution, in float64."""
        # torch.cholesky_solve would copy the factor
        half = torch.linalg.solve_triangular(self._factor, right.double(), upper=False)
        return torch.linalg.solve_triangular(self._factor.mT, half, upper=True)
