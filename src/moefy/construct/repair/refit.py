"""The masked least-squares refit of `down_proj`, and the least-squares scale."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.split import Partition, Routing, slot_weights


def refit_down_proj(
    sample: FfnSample,
    target: Float[Tensor, "tokens hidden"],
    partition: Partition,
    routing: Routing,
    *,
    ridge: float,
) -> Float[Tensor, "hidden slots"]:
    """Return the `down_proj` that makes the routed FFN closest to the target.

    W = argmin Σ_t ω_t·‖y_t − W·h̃_t‖² + λ̄·‖W − W₀‖², h̃ = h ⊙ the slot's gate weight (0 where its
    expert does not run, 1 for shared slots), W₀ the dense columns: with R = Y − H̃·W₀ᵀ,
    Wᵀ = W₀ᵀ + (H̃ᵀΩH̃ + λ̄·I)⁻¹·H̃ᵀΩR, λ̄ = λ·mean(diag). Streamed: memory is the Gram matrix and
    one chunk of activations. Solved in float64.

    W₀ is feasible, so the weighted calibration error never rises; a slot that no token uses keeps
    its dense column.

    Args:
        sample: of the layer.
        target: y, usually the dense FFN's own outputs.
        partition: of the neurons.
        routing: of the tokens.
        ridge: λ, in units of the mean diagonal of the Gram matrix.
    """
    slots = torch.from_numpy(partition.slots)
    start = sample.down[:, slots]
    gram = torch.zeros(len(slots), len(slots))
    right = torch.zeros(len(slots), len(start))
    for tokens, activations in sample.chunks():
        masked = activations[:, slots]
        masked = masked * slot_weights(partition, routing.weights(sample.inputs[tokens]))
        weighted = masked * sample.token_weights[tokens, None]
        gram += weighted.T @ masked
        right += weighted.T @ (target[tokens] - masked @ start.T)
    system = gram.double()
    system.diagonal().add_(ridge * system.diagonal().mean().clone().clamp_min(1e-30))
    change = torch.cholesky_solve(right.double(), torch.linalg.cholesky(system))
    return (start.double() + change.T).float()


def least_squares_scale(
    sample: FfnSample,
    target: Float[Tensor, "tokens hidden"],
    partition: Partition,
    routing: Routing,
) -> float:
    """Return the factor s that minimises Σ_t ω_t·‖y_t − s·f_t‖², f the split FFN's outputs.

    s = Σ ω·⟨y, f⟩ / Σ ω·‖f‖², one number for the layer.
    """
    slots = torch.from_numpy(partition.slots)
    down = sample.down[:, slots]
    above = below = 0.0
    for tokens, activations in sample.chunks():
        masked = activations[:, slots]
        masked = masked * slot_weights(partition, routing.weights(sample.inputs[tokens]))
        outputs = masked @ down.T
        weight = sample.token_weights[tokens, None]
        above += float((weight * outputs * target[tokens]).double().sum())
        below += float((weight * outputs.square()).double().sum())
    return above / below if below else 1.0
