"""Ridge regression of the experts' energies on the FFN's input, in closed form."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3
"""λ, in units of the mean diagonal of the inputs' Gram matrix."""
Energy = Literal["energy", "log-energy"]


class RidgeRouter:
    """Fits routers to target energies; the inputs' Gram matrix is factored once.

    W = argmin Σ_t ω_t·‖φ(e_t) − W·z_t‖² + λ̄·‖W‖²: (Zᵀ·Ω·Z + λ̄·I)·Wᵀ = Zᵀ·Ω·φ(E), where z is the
    FFN's input, ω a token's weight, λ̄ = 1e-3·mean(diag(ZᵀΩZ)). φ is the identity (`energy`) or
    log(e + 1e-3·mean(e)) (`log-energy`): only the order of the experts within a token matters, and
    the logarithm keeps the few tokens with enormous energies from fixing it for all others.

    Solved in float64. The router has no bias, as the native targets have none.

    Args:
        inputs: z, [tokens, hidden].
        token_weights: ω, [tokens].
        target: φ.
    """

    def __init__(
        self,
        inputs: Float[Tensor, "tokens hidden"],
        token_weights: Float[Tensor, " tokens"],
        *,
        target: Energy,
    ) -> None:
        self._weighted = inputs * token_weights[:, None]
        gram = (self._weighted.T @ inputs).double()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clone())
        self._factor = torch.linalg.cholesky(gram)
        self._target = target

    def __call__(
        self, energies: Float[Tensor, "tokens experts"]
    ) -> Float[Tensor, "experts hidden"]:
        """Return the router for these energies."""
        if self._target == "log-energy":
            energies = (energies + 1e-3 * energies.mean() + 1e-30).log()
        right = (self._weighted.T @ energies).double()
        return torch.cholesky_solve(right, self._factor).T.float().contiguous()
