"""Static pruning, the baseline that routing has to beat at equal active parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample, swiglu
from moefy.construct.partition.coactivation import highest


@dataclass(frozen=True)
class PrunedFfn:
    """An FFN with fewer neurons and an output bias.

    Attributes:
        gate, up: [kept, hidden].
        down: [hidden, kept].
        bias: [hidden].
    """

    gate: Float[Tensor, "kept hidden"]
    up: Float[Tensor, "kept hidden"]
    down: Float[Tensor, "hidden kept"]
    bias: Float[Tensor, " hidden"]

    def __call__(self, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Return the pruned FFN's outputs."""
        return swiglu(inputs, self.gate, self.up) @ self.down.T + self.bias


def flap(sample: FfnSample, num_kept: int) -> PrunedFfn:
    """Keep the neurons that fluctuate most, and replace the others by their mean contribution.

    score_j = Var_t(h_tj)·‖w_j‖², bias = Σ_{dropped j} E_t[h_tj]·w_j.

    Source: FLAP (arXiv 2312.11983). Deviation: the same number of neurons in every layer, because
    the comparison is at equal active parameters per layer.

    Args:
        sample: of the layer.
        num_kept: neurons to keep.
    """
    total = torch.zeros(sample.num_neurons, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for _, activations in sample.chunks():
        total += activations.double().sum(0)
        squares += activations.double().square().sum(0)
    mean = total / sample.num_tokens
    variance = squares / sample.num_tokens - mean.square()
    kept = highest(variance * sample.down.double().square().sum(0), num_kept)
    dropped = np.setdiff1d(np.arange(sample.num_neurons), kept)
    bias = (sample.down[:, dropped].double() @ mean[dropped]).float()
    return PrunedFfn(sample.gate[kept], sample.up[kept], sample.down[:, kept], bias)
