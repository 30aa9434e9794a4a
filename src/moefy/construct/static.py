"""Static pruning, the baseline that routing has to beat at equal active parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.partition.coactivation import highest


@dataclass(frozen=True)
class PrunedFfn:
    """An FFN with fewer neurons, `kept` in ascending order, and an output bias."""

    kept: Int[np.ndarray, " kept"]
    bias: Float[Tensor, " hidden"]

    def __call__(self, sample: FfnSample) -> Float[Tensor, "tokens hidden"]:
        """Return the pruned FFN's outputs for the tokens of a sample of the dense one."""
        down = sample.down[:, self.kept].T
        return torch.cat([h[:, self.kept] @ down + self.bias for _, h in sample.chunks()])


def flap(sample: FfnSample, num_kept: int) -> PrunedFfn:
    """Keep the neurons that fluctuate most, and replace the others by their mean contribution.

    score_j = Var_t(h_tj)·‖w_j‖², bias = Σ_{dropped j} E_t[h_tj]·w_j.

    Source: FLAP (arXiv 2312.11983). Deviation: the same number of neurons in every layer, because
    the comparison is at equal active parameters per layer.
    """
    total = sample.down.new_zeros(sample.num_neurons, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for _, activations in sample.chunks():
        total += activations.double().sum(0)
        squares += activations.double().square().sum(0)
    # variances in float64: of large means they are small differences
    mean = total / sample.num_tokens
    variance = squares / sample.num_tokens - mean.square()
    kept = highest(variance * sample.down.double().square().sum(0), num_kept)
    dropped = np.setdiff1d(np.arange(sample.num_neurons), kept)
    bias = (sample.down[:, dropped].double() @ mean[dropped]).float()
    return PrunedFfn(kept, bias)
