"""Routers from prototypes: one weight vector per expert, taken from its neurons' gate rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition
from moefy.construct.partition.coactivation import contribution_gram


def mean_gate_router(
    gate: Float[Tensor, "neurons hidden"], partition: Partition
) -> Float[Tensor, "experts hidden"]:
    """Return the mean gate row of each expert's neurons.

    Source: ExpertWeaver (arXiv 2602.15521): the router of an expert is its mean gate vector. No
    deviation.
    """
    return gate.float()[torch.from_numpy(partition.routed)].mean(dim=1)


def representative_router(
    sample: FfnSample, partition: Partition
) -> Float[Tensor, "experts hidden"]:
    """Return the gate row of the neuron that stands for each expert.

    The representative of an expert is the neuron whose contributions |h|·‖w‖ over the calibration
    tokens have the largest cosine with the expert's summed contributions.

    Source: CMoE (arXiv 2502.04416), section 4.2: the neuron nearest to the cluster's centroid, and
    the score |silu(g·x)·(u·x)|. Deviation: the product of two linear forms is no linear form, so a
    native router (a matrix) cannot express the score; its factor g·x, whose sign decides whether
    the neuron is on at all, stands for it.
    """
    gram = contribution_gram(sample)
    rows = []
    for neurons in partition.routed:
        inner = gram[neurons][:, neurons]
        # ⟨c_j, Σ_i c_i⟩ / ‖c_j‖: the norm of the sum is the same for all neurons of an expert
        nearness = inner.sum(1) * inner.diagonal().clamp_min(1e-30).rsqrt()
        rows.append(sample.gate[neurons[int(nearness.argmax())]])
    return torch.stack(rows)
