"""Ridge regression of the experts' energies on the FFN's input, in closed form."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moefy.construct.solve import RidgeFactor


class RidgeSystem:
    """The weighted normal equations of a linear router; their matrix is factored once.

    Args:
        inputs: z, the FFN's inputs.
        token_weights: ω, how much each token counts.
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
        self._factor = RidgeFactor(self._weighted.T @ inputs, ridge)

    def solve(self, target: Float[Tensor, "tokens experts"]) -> Float[Tensor, "experts hidden"]:
        """Return W = argmin Σ_t ω_t·‖target_t − W·z_t‖² + λ̄·‖W‖².

        (Zᵀ·Ω·Z + λ̄·I)·Wᵀ = Zᵀ·Ω·target. No bias, as the native targets have none.
        """
        # in float64: a Gram matrix has the squared condition number of the inputs
        return self._factor.solve(self._weighted.T @ target).T.float().contiguous()


def log_energies(energies: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
    """Return log(e + 1e-3·mean(e)).

    Only the order of the experts within a token matters; the logarithm keeps the few tokens with
    enormous energies from fixing it for all others.
    """
    # 1e-3 of the mean is below what decides a choice; 1e-30 where a layer is all zeros
    return (energies + 1e-3 * energies.mean() + 1e-30).log()
