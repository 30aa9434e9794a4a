"""CMoE's carving: shared by activation rate, the rest by which neurons are active together."""

from __future__ import annotations

import numpy as np
import torch

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition
from moefy.construct.partition.coactivation import cluster_by_gram
from moefy.split import Split

ACTIVE_PER_TOKEN = 10
"""K_a: a neuron is active on a token if its |h| is among that token's ten largest."""


def carve(sample: FfnSample, split: Split, generator: np.random.Generator) -> Partition:
    """Carve experts out of a dense FFN by binary activation columns.

    a_tj = 1 if |h_tj| is among the ten largest of token t, else 0. The neurons with the highest
    rate Σ_t a_tj are shared; the others go through balanced k-means on their columns a_·j.

    Source: CMoE (arXiv 2502.04416), section 4.1. Deviations: columns are L2-normalised before the
    clustering, because most are almost empty; the k-means starts at random instead of at the
    columns with the highest rate.
    """
    gram = sample.down.new_zeros(sample.num_neurons, sample.num_neurons)
    for _, activations in sample.chunks():
        largest = activations.abs().topk(min(ACTIVE_PER_TOKEN, sample.num_neurons), dim=1).indices
        active = torch.zeros_like(activations).scatter_(1, largest, 1.0)
        gram += active.T @ active  # its diagonal is the rate, because a² = a
    return cluster_by_gram(gram, split, generator)
