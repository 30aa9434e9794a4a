"""Ridge regression of the experts' energies on the FFN's input, in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class RidgeSystem:
    """The weighted normal equations of a linear router; their matrix is factored once.

    Solved in float64.

    Args:
        inputs: z, [tokens, hidden].
        token_weights: ω, [tokens].
        ridge: λ, in units of the mean diagonal of ZᵀΩZ.
    """

    def __init__(
        self,
        inputs: Float[Tensor, "tokens hidden"],
        token_weights: Float[Tensor, " tokens"],
        *,
        ridge: float,
    ) -> None:
        self.inputs = inputs
        self._weighted = inputs * token_weights[:, None]
        gram = (self._weighted.T @ inputs).double()
        gram.diagonal().add_(ridge * gram.diagonal().mean().clone())
        self._factor = torch.linalg.cholesky(gram)

    def solve(self, target: Float[Tensor, "tokens experts"]) -> Float[Tensor, "experts hidden"]:
        """Return W = argmin Σ_t ω_t·‖target_t − W·z_t‖² + λ̄·‖W‖².

        (Zᵀ·Ω·Z + λ̄·I)·Wᵀ = Zᵀ·Ω·target. No bias, as the native targets have none.
        """
        right = (self._weighted.T @ target).double()
        return torch.cholesky_solve(right, self._factor).T.float().contiguous()


def log_energies(energies: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
    """Return log(e + 1e-3·mean(e)).

    Only the order of the experts within a token matters; the logarithm keeps the few tokens with
    enormous energies from fixing it for all others.
    """
    return (energies + 1e-3 * energies.mean() + 1e-30).log()
