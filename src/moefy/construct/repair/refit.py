"""The masked least-squares refit of `down_proj`, and the least-squares scale."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition, Routing, masked_chunks
from moefy.construct.solve import RidgeFactor

_BLOCK_SLOTS = 256


def refit_down_proj(
    sample: FfnSample, partition: Partition, routing: Routing, *, ridge: float
) -> Float[Tensor, "hidden slots"]:
    """Return the `down_proj` that makes the routed FFN closest to the sample's target.

    W = argmin Σ_t ω_t·‖y_t − W·h̃_t‖² + λ̄·‖W − W₀‖², h̃ = h ⊙ the slot's gate weight (0 where its
    expert does not run, 1 for shared slots), W₀ the dense columns: with G = H̃ᵀΩH̃,
    Wᵀ = (G + λ̄·I)⁻¹·(H̃ᵀΩY + λ̄·W₀ᵀ), λ̄ = λ·mean(diag G), λ = `ridge`.

    W₀ is feasible, so the weighted calibration error never rises; a slot that no token uses keeps
    its dense column.
    """
    target = sample.target()
    start = partition.columns(sample.down).double()
    num_slots = start.shape[1]
    # streamed: memory is the Gram matrix and one chunk of activations
    gram = sample.down.new_zeros(num_slots, num_slots)
    right = sample.down.new_zeros(num_slots, len(start))
    for tokens, masked in masked_chunks(sample, partition, routing):
        weighted = masked * sample.token_weights[tokens, None]  # [chunk, slots]
        for first in range(0, num_slots, _BLOCK_SLOTS):  # the other triangle is the same
            block = slice(first, first + _BLOCK_SLOTS)
            gram[block, first:] += weighted[:, block].T @ masked[:, first:]
        right += weighted.T @ target[tokens]
    # the blocks on the diagonal have entries below it, which must not be counted twice
    gram.triu_()
    gram += gram.triu(1).T
    factor = RidgeFactor(gram, ridge)
    return factor.solve(right.double().add_(start.T, alpha=factor.added)).T.float()


def least_squares_scale(sample: FfnSample, partition: Partition, routing: Routing) -> float:
    """Return the factor s that minimises Σ_t ω_t·‖y_t − s·f_t‖², f the split FFN's outputs.

    s = Σ ω·⟨y, f⟩ / Σ ω·‖f‖², one number for the layer.
    """
    target = sample.target()
    down = partition.columns(sample.down)
    above = below = 0.0
    for tokens, masked in masked_chunks(sample, partition, routing):
        outputs = masked @ down.T
        weight = sample.token_weights[tokens, None]
        above += float((weight * outputs * target[tokens]).double().sum())
        below += float((weight * outputs.square()).double().sum())
    return above / below if below else 1.0  # nothing runs where all outputs are 0
