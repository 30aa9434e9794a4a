"""Analytic ascent on the energy that a router keeps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.construct.router.ridge import RidgeSystem

STEPS = 10
SOFTNESS = 0.3
"""Width of the soft choice, in standard deviations of the logits."""
STEP_SIZE = 0.3
"""Largest change of the logits in one step, in the same unit."""


def kept_energy_ascent(
    router: Float[Tensor, "experts hidden"],
    energies: Float[Tensor, "tokens experts"],
    system: RidgeSystem,
    active: int,
) -> Float[Tensor, "experts hidden"]:
    """Raise the energy of the experts that a router chooses.

    Regression spends its accuracy on all experts alike; only who is among the k largest matters.
    The choice is softened to p_te = sigmoid((s_te − θ_t)/τ), s the logits, θ_t the middle between
    the token's k-th and (k+1)-th logit, τ = 0.3·std(s). With q = p·(1 − p), the kept energy
    Σ_te ω_t·p_te·e_te, its sum of p held fixed per token, rises fastest along
    g_te = q_te·(e_te − ē_t), ē_t = Σ_e q_te·e_te / Σ_e q_te. Each of ten steps moves the logits
    along the projection of g onto what a linear router can express,
    ΔWᵀ = (ZᵀΩZ + λ̄·I)⁻¹·ZᵀΩg, scaled so that they change by 0.3·std(s).

    Source: none known; moefy's own. It needs no gradient of the model, only the energies.

    Args:
        router: the start, usually a ridge regression.
        energies: e, the energies of the routed experts.
        system: inputs and their factored Gram matrix.
        active: k, routed experts that run.
    """
    # only their ratio matters, and products of small numbers would leave float32
    energies = energies / energies.mean().clamp_min(1e-30)
    for _ in range(STEPS):
        logits = system.inputs @ router.T
        spread = (logits - logits.mean(dim=1, keepdim=True)).std()
        change = system.solve(kept_energy_gradient(logits, energies, active, SOFTNESS * spread))
        size = (system.inputs @ change.T).std()
        if not size > 0:  # all energies equal, or NaN
            break
        router = router + change * (STEP_SIZE * spread / size)
    return router


def kept_energy_gradient(
    logits: Float[Tensor, "tokens experts"],
    energies: Float[Tensor, "tokens experts"],
    active: int,
    softness: Float[Tensor, ""],
) -> Float[Tensor, "tokens experts"]:
    """Return g of `kept_energy_ascent`, in units of 1/τ; τ is `softness`."""
    highest = logits.topk(active + 1, dim=1).values  # the last two are the k-th and (k+1)-th
    threshold = highest[:, active - 1 :].mean(dim=1, keepdim=True)
    soft = torch.sigmoid((logits - threshold) / softness)
    slope = soft * (1 - soft)
    total = slope.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return slope * (energies - (slope * energies).sum(dim=1, keepdim=True) / total)
