"""Routers from prototypes: one weight vector per expert, taken from its neurons' gate rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition


def mean_gate_router(
    gate: Float[Tensor, "neurons hidden"], partition: Partition
) -> Float[Tensor, "experts hidden"]:
    """Return the mean gate row of each expert's neurons.

    Source: ExpertWeaver (arXiv 2602.15521): the router of an expert is its mean gate vector. No
    deviation.

    Args:
        gate: of the dense FFN.
        partition: of the neurons.
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

    Args:
        sample: of the layer.
        partition: of the neurons.
    """
    column_norms = sample.down.norm(dim=0)
    gram = sample.down.new_zeros(sample.num_neurons, sample.num_neurons)
    for _, activations in sample.chunks():
        contribution = activations.abs() * column_norms
        gram += contribution.T @ contribution
    rows = []
    for neurons in partition.routed:
        inner = gram[neurons][:, neurons]
        nearness = inner.sum(1) * inner.diagonal().clamp_min(1e-30).rsqrt()
        rows.append(sample.gate[neurons[int(nearness.argmax())]])
    return torch.stack(rows)
