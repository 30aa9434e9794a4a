"""What a router should foresee: how much each expert contributes to the output at each token."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition


def expert_energies(sample: FfnSample, partition: Partition) -> Float[Tensor, "tokens experts"]:
    """Return Σ_{j∈e} h_tj²·‖w_j‖² for every token t and routed expert e.

    It is the expert's output energy if the contributions of its neurons were orthogonal; unlike
    ‖Σ_j h_tj·w_j‖² it does not favour experts whose neurons merely point the same way, and costs
    one product with an indicator matrix. The other one was tried: docs/experiments.md, section 3.
    """
    # [neurons, experts]: ‖w_j‖² where neuron j belongs to expert e, else 0
    member = sample.down.new_zeros(sample.num_neurons, len(partition.routed))
    for expert, neurons in enumerate(partition.routed):
        member[torch.from_numpy(neurons), expert] = 1.0
    member *= sample.down.square().sum(0)[:, None]
    return torch.cat([activations.square() @ member for _, activations in sample.chunks()])


def scaled(
    router: Float[Tensor, "experts hidden"], norm_gain: Float[Tensor, " hidden"], logit_std: float
) -> Float[Tensor, "experts hidden"]:
    """Scale a router so that its logits differ by about `logit_std` between experts.

    A positive factor changes no choice; small logits make the chosen experts' weights nearly equal,
    as in the dense sum. The input of a router is x_j = g_j·z_j, g the RMSNorm's gain and
    mean(z²) = 1; if the z_j are taken as uncorrelated, the logits of expert e have the variance
    Σ_j (g_j·W_ej)².
    """
    # what all experts have in common moves no choice and no softmax
    centred = (router - router.mean(dim=0)) * norm_gain
    spread = float(centred.double().square().sum(dim=1).mean().sqrt())
    # a power of two, so that not even rounding changes a choice
    return router * 2.0 ** round(math.log2(logit_std / max(spread, 1e-30)))
